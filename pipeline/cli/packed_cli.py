"""secateur packed: files in the layout that the paper's authors released, to and from safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

packed_app = typer.Typer(
    help="Read and write files as the paper's authors released them, not a run's final/model.packed.",
    no_args_is_help=True,
)

LayersPath = Annotated[Path, typer.Argument(metavar="LAYERS.yaml", help="A list of {name, shape}, in prototxt order.")]


@packed_app.command("read-released")
def read_released(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A released file.")],
    layers: LayersPath,
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Weights, biases, codebooks, codes and gaps.")],
) -> None:
    """Unpack a released file; write-released makes it again, byte for byte."""
    from safetensors.numpy import save

    from pipeline import storage
    from pipeline.export import released

    listed = released.load_layers(layers)
    tensors = released.read_released(file, listed)
    storage.write_bytes(out, save(tensors))
    for layer in listed:
        codes = tensors[f"{layer.name}.codes"]
        kept = int((codes != 0).sum())
        print(f"{layer.name}: {kept:,} of {layer.weights:,} weights, {len(codes) - kept:,} fillers")


@packed_app.command("write-released")
def write_released(
    tensors: Annotated[
        Path,
        typer.Argument(metavar="IN.safetensors", help="Of each layer its bias, and its codebook and codes or weight."),
    ],
    layers: LayersPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The released file to write.")],
) -> None:
    """Write a released file from quantised weights, or from codebooks and codes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from pipeline import storage
    from pipeline.base.errors import UserError
    from pipeline.export import released

    listed = released.load_layers(layers)
    if not storage.exists(tensors):
        raise UserError(f"'{tensors}' does not exist: give a safetensors file")
    try:
        content = load(storage.read_bytes(tensors))
    except (SafetensorError, KeyError) as error:
        raise UserError(f"'{tensors}' is no safetensors file that numpy can hold: {error}") from None
    size = released.write_released(file, listed, content)
    print(f"{file}: {size:,} bytes")
