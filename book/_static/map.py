"""Which chapter builds on which: the map of the front page.

    python book/_static/map.py > book/_static/map.svg
"""
LEFT, MIDDLE, RIGHT, WIDTH, HEIGHT, ROW = 88, 180, 272, 160, 46, 84
COLOURS = {"start": "#5c6773", "Foundations": "#0072b2", "Fast sampling": "#a84600", "Control": "#00735c"}
PAGES = {  # name: centre of its box, row, part
    "Prerequisites": (MIDDLE, 0, "start"),
    "1 Playground": (MIDDLE, 1, "Foundations"),
    "2 DDPM": (MIDDLE, 2, "Foundations"),
    "3 DDIM": (LEFT, 3, "Foundations"),
    "4 Flow matching": (RIGHT, 3, "Foundations"),
    "5 Solvers": (LEFT, 4, "Fast sampling"),
    "6 Distillation": (RIGHT, 4, "Fast sampling"),
    "7 One step": (RIGHT, 5, "Fast sampling"),
    "8 Leaderboard": (LEFT, 6, "Fast sampling"),
    "9 Guidance": (RIGHT, 6, "Control"),
}
ARROWS = [  # from, to, and how far beside the middle an arrow leaves and lands
    ("P", "1", 0, 0), ("1", "2", 0, 0), ("2", "3", -24, 24), ("2", "4", 24, -24), ("3", "5", 0, 0), ("3", "6", 24, -24),
    ("4", "5", -24, 24), ("4", "6", 0, 0), ("6", "7", 0, 0), ("5", "8", 0, 0), ("6", "8", -72, 24), ("7", "8", -24, 52)]


def box(name):
    x, row, part = PAGES[name]
    y = 30 + ROW * row
    return (f'<rect x="{x - WIDTH // 2}" y="{y - HEIGHT // 2}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{COLOURS[part]}"/>'
            f'<text x="{x}" y="{y + 6}">{name}</text>')


def arrow(first, last, leaves, lands):
    (x, row, _), (to, then, _) = (next(PAGES[n] for n in PAGES if n.startswith(k)) for k in (first, last))
    begin, end = 30 + ROW * row + HEIGHT // 2, 30 + ROW * then - HEIGHT // 2 - 3
    return f'<path d="M{x + leaves} {begin}L{to + lands} {end}" marker-end="url(#tip)"/>'


def drawing():
    height = 60 + ROW * 6
    edge = RIGHT + WIDTH // 2
    bends = [f'M{edge} {30 + ROW * 3}h10q6 0 6 6v{n * ROW - 12}q0 6 -6 6h-9' for n in (2, 3)]    # from 4 to 7 and to 9
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 378 {height}" font-family="sans-serif" font-size="17">',
        '<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#8a94a0"/></marker>',
        '<g fill="none" stroke="#8a94a0" stroke-width="2">',
        *[arrow(*ends) for ends in ARROWS], *[f'<path d="{bend}" marker-end="url(#tip)"/>' for bend in bends],
        '</g>', '<g fill="#fff" text-anchor="middle">', *map(box, PAGES), '</g>', '</svg>'])


if __name__ == "__main__":
    print(drawing())
