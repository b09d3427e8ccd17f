"""The two pictures of the front page, drawn by networks that come with
the package: twelve digits and twelve faces, from seeds in a row.

    python book/_static/front.py [FOLDER]
"""
import sys
from pathlib import Path

import torch

import diffcourse as dc
from diffcourse.evaluation import to_bytes

COLUMNS, ROWS, GAP = 4, 3, 8  # pictures side by side; pixels between them
SIDE = 96  # pixels of a picture in the file
STEPS = 5  # what both students were distilled for
PICTURES = {  # file: weights, shape of a sample, first seed
    "front_digits.png": ("digits/distilled-5", (1, 8, 8), 0),
    "front_faces.png": ("faces32/distilled-5", (3, 32, 32), 1000),
}


def drawn(weights, shape, seed):
    "(n, C, H, W) samples, one a seed."
    den = dc.load(weights, source="shipped", device="cpu")
    seeds = range(seed, seed + COLUMNS * ROWS)
    return dc.sample(den, shape, dc.DDIM(), dc.uniform(STEPS), seeds=seeds, progress=False).x


def sheet(x):
    "(height, width, 4) bytes: the pictures, and nothing between them."
    size = SIDE // x.shape[-1]
    tiles = to_bytes(x).cpu().expand(-1, 3, -1, -1)
    tiles = tiles.repeat_interleave(size, 2).repeat_interleave(size, 3).permute(0, 2, 3, 1)
    step = SIDE + GAP
    out = torch.zeros(ROWS * step - GAP, COLUMNS * step - GAP, 4, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // COLUMNS * step, i % COLUMNS * step
        out[top:top + SIDE, left:left + SIDE, :3] = tile
        out[top:top + SIDE, left:left + SIDE, 3] = 255
    return out


def main(folder):
    from PIL import Image

    for name, how in PICTURES.items():
        file = Path(folder) / name
        Image.fromarray(sheet(drawn(*how)).numpy(), "RGBA").save(file, optimize=True)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
