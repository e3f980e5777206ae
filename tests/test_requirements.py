"""requirements-oldest.txt has the versions that the other requirements name, and the README says so."""

import re

from support.scripts import ROOT


def pinned(name: str, sign: str) -> dict[str, str]:
    """{package: version} of a file of requirements, of its lines `package sign version`."""
    lines = (ROOT / name).read_text().splitlines()
    found = (re.match(rf"(?:# optional: )?([\w-]+){sign}([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def test_the_oldest_versions_are_those_of_the_bounds():
    bounds = pinned("requirements.txt", ">=") | pinned("requirements-dev.txt", ">=")
    oldest = pinned("requirements-oldest.txt", "==")
    assert set(bounds) - {"ruff"} <= set(oldest)
    for package in set(bounds) & set(oldest):
        bound, version = bounds[package].split("."), oldest[package].split(".")
        assert version[: len(bound)] == bound, f"{package} {oldest[package]}, not {bounds[package]}"
    readme = (ROOT / "README.md").read_text()
    assert f"torch {oldest['torch']}" in readme and f"torchvision {oldest['torchvision']}" in readme
