"""Packaging: what a wheel contains, what it needs and which command it installs."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12,<0.13",
    "optax>=0.2.8,<0.3",
    # 1.0 swaps the meaning of the top-level API.
    "orbax-checkpoint>=0.12.3,<1.0",
    "tensorflow-datasets>=4.9.10,<5",
    # tensorflow-datasets imports it for users' builders that live in a package, undeclared.
    "importlib_resources",
    # Earlier 5.x releases carry CVE-2026-4372.
    "transformers>=5.3,<6",
    "chex>=0.1.92,<0.2",
    # What transformers and jax bring along; named here because they are imported here.
    "huggingface_hub>=1.0",
    "ml_dtypes>=0.5",
    "safetensors>=0.7",
    "numpy>=2.0",
    "scipy>=1.13",
    "Pillow",
    "tqdm",
    "grain>=0.2.18,<0.3",
    "sentencepiece",
    "regex",
    "tyro>=1.0,<2",
]

DEMO = ["scikit-learn>=1.5", "matplotlib>=3.9"]
LOGGING = ["tensorboardX>=2.6", "tensorboard>=2.21", "wandb"]

EXTRAS = {
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "demo": DEMO,
    "logging": LOGGING,
    "convert": ["torch>=2.6"],
    "test": [
        *DEMO,
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "tensorboardX>=2.6",
        "setuptools>=77",
        # Exact, because another formatter or checker release can fail code that did not change.
        "ruff==0.17.6",
        "pyrefly==1.4.1",
    ],
    "docs": ["sphinx>=8", "myst-nb>=1.2", "furo"],
}

setup(
    name="diffusion_jax",
    version="0.1.0",
    description="Image diffusion in JAX and Flax: from DDPM to Imagen, latent diffusion and GLIGEN",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # The experiments lie at the top of the repository, where they are read and edited, and
    # travel inside the package, so that an installed command line has them too.
    packages=sorted(
        {
            *find_packages(include=["diffusion_jax", "diffusion_jax.*"]),
            "diffusion_jax.experiments",
            "diffusion_jax.experiments.proofs",
        }
    ),
    package_dir={"diffusion_jax.experiments": "experiments"},
    package_data={"diffusion_jax": ["py.typed"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["diffusion-jax = diffusion_jax.cli:main"]},
)
