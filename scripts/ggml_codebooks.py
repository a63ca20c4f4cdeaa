#!/usr/bin/env python3
"""Writes src/dialect/gguf/blocks/codebooks.bin: the codebooks of ggml's IQ1, IQ2 and IQ3 types.

The entries are part of the format (ggml-common.h: iq2xxs_grid … iq1s_grid); they are read as data from gguf-py's
`gguf.quants`. Needs `pip install gguf==0.19.0 numpy`. A u16 an entry: the place of each value in the codebook's ascending
values, two bits each of eight values, four bits each of four.
"""

from pathlib import Path

import numpy as np
from gguf import quants

OUT = Path(__file__).parent.parent / "src" / "dialect" / "gguf" / "blocks" / "codebooks.bin"


def entries(kind):
    """Returns the codebook of a type as u16."""
    kind.init_grid()
    values = kind.grid.reshape(kind.grid_shape)
    places = np.searchsorted(np.array(kind.grid_map, dtype=np.float32), values)
    assert (np.array(kind.grid_map)[places] == values).all()
    bits = 16 // kind.grid_shape[1]
    return (places << (bits * np.arange(kind.grid_shape[1]))).sum(axis=1).astype("<u2")


def main():
    kinds = [quants.IQ2_XXS, quants.IQ2_XS, quants.IQ2_S, quants.IQ3_XXS, quants.IQ3_S, quants.IQ1_S]
    OUT.write_bytes(b"".join(entries(kind).tobytes() for kind in kinds))


if __name__ == "__main__":
    main()
