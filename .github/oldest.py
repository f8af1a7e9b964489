"""Print the lower ends of setup.cfg's ranges as pip constraints: python .github/oldest.py > oldest.txt

Only what is installed with the package itself: test tools may be new.
"""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path


def lower_ends(text: str) -> list[str]:
    """``name==version`` for each line ``name>=version``; raises ``ValueError`` where there is no lower end."""
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        match = re.match(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9][0-9.]*)", line)
        if match is None:
            raise ValueError(f"setup.cfg: {line!r} has no lower end; write {line.split()[0]}>=VERSION.")
        found.append(f"{match[1]}=={match[2]}.*")
    return found


if __name__ == "__main__":
    parser = configparser.ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg")
    sys.stdout.write("\n".join(lower_ends(parser["options"]["install_requires"])) + "\n")
