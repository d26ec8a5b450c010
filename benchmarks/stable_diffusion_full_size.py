"""Loads Stable Diffusion 1.5's networks at full size and compares them with diffusers.

python benchmarks/stable_diffusion_full_size.py [--only unet vae text_encoder] [--folder DIR]

Needs torch, diffusers and transformers. They write each network with random weights (seed 0) and
one output; a fresh process, in which none of them is imported, loads the folder with
`from_pretrained` and repeats the call. For every network it prints the parameters, the seconds to
load, the peak memory of the process right after loading and at its end, and the largest
difference of the outputs beside the largest output. Everything is float32, on the CPU.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PARTS = ("unet", "vae", "text_encoder")
GIB = 2**30


def _network(part: str):
    """The peer's network with the configuration of stable-diffusion-v1-5."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    if part == "unet":
        # UNet2DConditionModel's own defaults, but for the width of the text.
        return diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8
        )
    if part == "vae":
        return diffusers.AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            hidden_act="quick_gelu",
            eos_token_id=2,
        )
    )


def _inputs(part: str) -> dict[str, np.ndarray]:
    """Arguments of the call, images as diffusers wants them."""
    random = np.random.default_rng(0)
    if part == "unet":
        return {
            "sample": random.standard_normal((1, 4, 64, 64), np.float32),
            "timestep": np.float32([500.0]),
            "tokens": random.standard_normal((1, 77, 768), np.float32),
        }
    if part == "vae":
        return {
            "image": random.uniform(-1.0, 1.0, (1, 3, 256, 256)).astype(np.float32),
            "latent": random.standard_normal((1, 4, 64, 64), np.float32),
        }
    return {"ids": random.integers(0, 49408, (1, 77))}


def write(part: str, folder: Path) -> None:
    """Writes the network and what it answers."""
    import torch

    network = _network(part).eval()
    network.save_pretrained(folder)
    given = {name: torch.from_numpy(value) for name, value in _inputs(part).items()}
    with torch.no_grad():
        if part == "unet":
            answer = network(given["sample"], given["timestep"], given["tokens"])
            outputs = {"out": answer.sample}
        elif part == "vae":
            outputs = {
                "mean": network.encode(given["image"]).latent_dist.mean,
                "image": network.decode(given["latent"]).sample,
            }
        else:
            answer = network(given["ids"])
            outputs = {"last": answer.last_hidden_state, "pooled": answer.pooler_output}
    np.savez(folder / "outputs.npz", **{name: value.numpy() for name, value in outputs.items()})


def _peak() -> float:
    """Peak resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def load(part: str, folder: Path) -> None:
    """Loads the network, repeats the call, and prints the row as JSON."""
    import jax

    from diffusion_jax.core.condition import Condition
    from diffusion_jax.pretrained import from_pretrained

    jax.config.update("jax_default_matmul_precision", "highest")
    begin = time.perf_counter()
    loaded = from_pretrained(folder)
    jax.block_until_ready(loaded.params)
    row = {"part": part, "seconds_to_load": time.perf_counter() - begin, "load_gib": _peak()}
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    given, module = _inputs(part), loaded.module
    if part == "unet":
        x = given["sample"].transpose(0, 2, 3, 1)
        cond = Condition(tokens=given["tokens"])
        apply = jax.jit(lambda params, x, t, cond: module.apply({"params": params}, x, t, cond))
        out = apply(loaded.params["network"], x, given["timestep"], cond)
        outputs = {"out": np.asarray(out).transpose(0, 3, 1, 2)}
    elif part == "vae":
        encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))
        decode = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))
        mean = encode(loaded.params, given["image"].transpose(0, 2, 3, 1)).mean
        image = decode(loaded.params, given["latent"].transpose(0, 2, 3, 1))
        outputs = {
            "mean": np.asarray(mean).transpose(0, 3, 1, 2),
            "image": np.asarray(image).transpose(0, 3, 1, 2),
        }
    else:
        apply = jax.jit(lambda params, ids: module.apply({"params": params}, ids))
        answer = apply(loaded.params, given["ids"])
        outputs = {"last": np.asarray(answer.last), "pooled": np.asarray(answer.pooled)}
    with np.load(folder / "outputs.npz") as expected:
        row["difference"] = max(
            float(np.abs(outputs[name] - expected[name]).max()) for name in expected
        )
        row["largest_output"] = max(float(np.abs(expected[name]).max()) for name in expected)
    row["peak_gib"] = _peak()
    row["torch_imported"] = any(name in sys.modules for name in ("torch", "diffusers"))
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="kept afterwards; a temporary one by default")
    parser.add_argument("--step", nargs=2, metavar=("write|load", "PART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"write": write, "load": load}[args.step[0]](args.step[1], args.folder)
        return
    print(
        f"{'network':12} {'parameters':>11} {'load s':>7} {'load GiB':>8} {'peak GiB':>8} "
        f"{'difference':>10} {'of':>8}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.only:
            folder = (args.folder or Path(temporary)) / part
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--folder", str(folder), "--step"]
            subprocess.run([*command, "write", part], check=True)
            done = subprocess.run(
                [*command, "load", part], check=True, stdout=subprocess.PIPE, text=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            assert not row["torch_imported"]
            print(
                f"{part:12} {row['parameters']:11,} {row['seconds_to_load']:7.1f} "
                f"{row['load_gib']:8.2f} {row['peak_gib']:8.2f} {row['difference']:10.1e} "
                f"{row['largest_output']:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
