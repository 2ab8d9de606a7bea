"""Pictures as files: PNGs, labelled grids, the strip of a training's snapshots."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """A picture [3, H, W] in 0…1 as a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def save_images(images: Tensor, folder: Path) -> None:
    """Write pictures [N, 3, H, W] as folder/sample_000.png, sample_001.png, …; older samples there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("sample_*.png"):
        old.unlink()
    for index, image in enumerate(images):
        to_pil(image).save(folder / f"sample_{index:03d}.png")


def save_grid(rows: dict[str, Tensor], columns: Sequence[str], file: Path, cell: int = 256) -> None:
    """One labelled picture: a row of pictures [N, 3, H, W] for each entry of `rows`, under a title for each column.

    Pictures are shown at most `cell` pixels wide.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    scale = min(1.0, cell / max(height, width))
    height, width = round(height * scale), round(width * scale)
    font = ImageFont.load_default(size=max(11, width // 11))
    letter = font.getlength("n")
    titles = [textwrap.fill(text, max(8, int(width / letter)), max_lines=4, placeholder=" …") for text in columns]
    line = font.getbbox("Ag")[3] + 3
    top = 8 + line * max(title.count("\n") + 1 for title in titles)
    names = [textwrap.fill(name, 18, max_lines=6, placeholder=" …") for name in rows]
    left = 16 + round(max(font.getlength(part) for name in names for part in name.split("\n")))
    grid = Image.new("RGB", (left + (width + 4) * len(columns), top + (height + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for x, title in enumerate(titles):
        draw.multiline_text((left + x * (width + 4), 4), title, fill="black", font=font, spacing=3)
    for y, (name, images) in enumerate(zip(names, rows.values(), strict=True)):
        row_top = top + y * (height + 4)
        draw.multiline_text((8, row_top + height // 2), name, fill="black", font=font, spacing=3, anchor="lm")
        for x, image in enumerate(images):
            grid.paste(to_pil(image).resize((width, height)), (left + x * (width + 4), row_top))
    file.parent.mkdir(parents=True, exist_ok=True)
    grid.save(file)


def save_strip(folder: Path, prompts: Sequence[str]) -> None:
    """folder/steps.png: the teacher and every snapshot in `folder`, one row each, a column for each prompt.

    folder/step-N.png: the teacher and the last one.
    """

    def read(snapshot: Path) -> Tensor:
        files = [snapshot / f"sample_{i:03d}.png" for i in range(len(prompts))]
        pictures = [torch.frombuffer(bytearray(Image.open(f).tobytes()), dtype=torch.uint8) for f in files]
        width, height = Image.open(files[0]).size
        return torch.stack([p.view(height, width, 3).permute(2, 0, 1).float() / 255 for p in pictures])

    snapshots = sorted(folder.glob("step_*/"), key=lambda path: int(path.name.removeprefix("step_")))
    snapshots = [s for s in snapshots if len(list(s.glob("sample_*.png"))) >= len(prompts)]
    rows = {"teacher": read(folder / "teacher")}
    rows |= {f"step {snapshot.name.removeprefix('step_')}": read(snapshot) for snapshot in snapshots}
    save_grid(rows, prompts, folder / "steps.png", cell=128)
    last = list(rows)[-1]
    latest = {name: rows[name] for name in ("teacher", last)}
    save_grid(latest, prompts, folder / f"{last.replace(' ', '-')}.png", cell=128)
