"""Full disks: a run whose disk fills up at any moment says so in one line, and goes on once there is room.

``python tests/campaigns/disk_full.py [--seconds 600] [--seed 0]`` needs Linux and root, for file systems in memory.
Each job writes to one of random size. What it says must be one line that names the folder and what to do; status 2; no
record that says ``done``, and no result under its name that is not whole. Then the file system grows, and the same
command must end with the bytes of a run in peace. Counts go into ``benchmarks/results/disk-full.json``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

from campaigns import forked, frame, kills, workshop  # noqa: E402 - after their path

RESULT = ROOT / "benchmarks/results/disk-full.json"
ROOM = 64 << 20


def mount(place: Path, size: int, *, again: bool = False) -> None:
    """Mount a file system of so many bytes in memory, or give it so many."""
    options = f"size={size},{'remount' if again else 'nr_inodes=10000'}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "modicum-full", str(place)], check=True)


def attempt(name: str, world: Path, size: int, peace: kills.Made) -> tuple[str, str | None]:
    """Fill the disk under one run, then make room; return what became of it, and what was wrong."""
    place = world / "full"
    place.mkdir(exist_ok=True)
    mount(place, size)
    try:
        command = ["run", f"{kills.file_of(name)}.yaml", "--out", "full/run", "--quiet"]
        first = forked.attempt(command, world, seconds=120)
        if first.status == 0:
            return "there was room", None if kills.made(place / "run") == peace else "other results"
        if wrong := first.trouble(seconds=60.0):
            return "full", wrong
        if "full" not in first.said and "no space" not in first.said.lower():
            return "full", f"says something else: {first.said.strip()[:300]}"
        if wrong := kills.unlawful(place / "run", peace):
            return "full", "; ".join(wrong)
        mount(place, ROOM, again=True)
        last = forked.attempt(command, world, seconds=300)
        if last.status != 0:
            return "full", f"afterwards exit status {last.status}: {last.said.strip()[-300:]}"
        if kills.made(place / "run") != peace:
            return "full", "afterwards other results"
        return "full", "; ".join(kills.leftovers(place / "run")) or None
    finally:
        subprocess.run(["umount", str(place)], check=True)


def campaign(at: frame.Campaign) -> None:
    """Fill the disk under one run at a time."""
    known = {name: recipe for name, recipe in workshop.recipes().items() if at.chosen.only in name}
    peace = kills.Peace(at.work / "world", known)
    for number in at.numbers():
        rng = at.rng(number)
        name = rng.choice(list(known))
        if (name.startswith(kills.RARE) and rng.random() < 0.9) or (found := peace(name)) is None:
            continue
        most = 40_000 + sum(size for size, _ in found.made[0].values())
        size = 4096 * (2 + int(rng.uniform(0.0, 1.5) * most) // 4096)
        at.tell(number, f"{name}, case {number}, {size} bytes", *attempt(name, peace.world, size, found.made))


def main() -> int:
    """Run the campaign where a disk can be made; else return 2."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        print("needs Linux and root", file=sys.stderr)
        return 2
    return frame.main(__doc__, RESULT, campaign)


if __name__ == "__main__":
    raise SystemExit(main())
