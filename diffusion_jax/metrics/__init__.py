"""Metrics of images: statistics in float64 on the host, feature networks on the device."""

from diffusion_jax.metrics.arrays import read_arrays, write_arrays
from diffusion_jax.metrics.class_score import ClassStats, InceptionScore, inception_score
from diffusion_jax.metrics.energy import EnergyDistance, energy_distance
from diffusion_jax.metrics.features import Feature, FeatureFn, Pixels
from diffusion_jax.metrics.frechet import Gaussian, GaussianStats, frechet_distance
from diffusion_jax.metrics.inception import Inception, InceptionFeatures, inception_shapes
from diffusion_jax.metrics.kernel import KernelDistance, kernel_distance, squared_mmd
from diffusion_jax.metrics.manifold import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    nearest_distances,
    nearest_ratio,
    precision_recall,
)
from diffusion_jax.metrics.pixel import psnr, ssim
from diffusion_jax.metrics.preprocess import resize_matrix, to_byte_range
from diffusion_jax.metrics.reference import (
    FrechetScore,
    Reference,
    frechet_score,
    load_foreign_images,
    load_foreign_reference,
    load_reference,
    save_reference,
)
from diffusion_jax.metrics.sliced import SlicedWasserstein, sliced_wasserstein
from diffusion_jax.metrics.stream import FeatureStream

__all__ = [
    "ClassStats",
    "DensityCoverage",
    "EnergyDistance",
    "Feature",
    "FeatureFn",
    "FeatureStream",
    "FrechetScore",
    "Gaussian",
    "GaussianStats",
    "Inception",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "Pixels",
    "PrecisionRecall",
    "Reference",
    "SlicedWasserstein",
    "density_coverage",
    "energy_distance",
    "frechet_distance",
    "frechet_score",
    "inception_score",
    "inception_shapes",
    "kernel_distance",
    "load_foreign_images",
    "load_foreign_reference",
    "load_reference",
    "nearest_distances",
    "nearest_ratio",
    "precision_recall",
    "psnr",
    "read_arrays",
    "resize_matrix",
    "save_reference",
    "sliced_wasserstein",
    "squared_mmd",
    "ssim",
    "to_byte_range",
    "write_arrays",
]
