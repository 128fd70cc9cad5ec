"""Print the oldest releases that pyproject.toml allows, as constraints for pip."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for lines in (project["dependencies"], *project["optional-dependencies"].values()):
    for line in lines:
        # Of torch, the Makefile names the one version.
        if (match := re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", line)) and match[1] != "torch":
            print(f"{match[1]}=={match[2]}")
