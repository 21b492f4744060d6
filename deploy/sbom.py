"""Write the bill of materials of the image, CycloneDX 1.6: packages, bundles and their files.

`python -m deploy.sbom --out build/sbom.cdx.json` at the root of the checkout. Packages are those of
the locked requirements; licences are read from the packages that are installed in those versions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from llm4ehr.bundle import Bundle, bundle_versions, load_bundle

REQUIREMENTS = Path(__file__).parent / "requirements"
_LICENCE = re.compile(r"^- [a-z0-9]+: ([A-Za-z0-9.-]+) \(", re.MULTILINE)


def packages() -> dict[str, Any]:
    """The bill of the packages alone, as the CycloneDX tool makes it of the locked requirements."""
    locked = "\n".join((REQUIREMENTS / name).read_text() for name in ("service.txt", "torch.txt"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "requirements", "-"),
            *("--pyproject", "pyproject.toml", "--spec-version", "1.6", "--output-reproducible"),
        ],
        input=locked,
        capture_output=True,
        text=True,
        check=True,
    )
    bill: dict[str, Any] = json.loads(done.stdout)
    for component in bill["components"]:
        if licences := _licences(component["name"], component["version"]):
            component["licenses"] = licences
    return bill


def _licences(name: str, version: str) -> list[dict[str, Any]]:
    """Of a package, if it is installed in that version: in the form of SPDX, or as it says it."""
    try:
        said = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return []
    if said["Version"].partition("+")[0] != version:
        return []
    if expression := said["License-Expression"]:
        return [{"expression": expression}]
    classifiers = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier", []) if "Lic" in c]
    names = classifiers or [said["License"] or ""]
    # Some packages put the whole text there.
    return [{"license": {"name": name}} for name in names if 0 < len(name) < 80]


def model(bundle: Bundle, manifest: dict[str, Any]) -> dict[str, Any]:
    """A bundle as a component: its digest, its files with theirs, and what licences hold for it."""
    name = f"{bundle.name}/{bundle.version}"
    licences = ["Apache-2.0", *sorted(set(_LICENCE.findall(bundle.card)))]
    return {
        "type": "machine-learning-model",
        "bom-ref": f"bundle:{name}",
        "name": bundle.name,
        "version": str(bundle.version),
        "description": "Weights and preprocessing; the hash is that of the manifest",
        "hashes": [{"alg": "SHA-256", "content": bundle.digest}],
        "licenses": [{"license": {"id": licence}} for licence in licences],
        "components": [
            {
                "type": "file",
                "bom-ref": f"bundle:{name}/{file}",
                "name": file,
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
            for file, digest in sorted(manifest["files"].items())
        ],
    }


def models(repository: Path) -> list[dict[str, Any]]:
    """All bundles of a repository, verified. Raises BundleError."""
    found = []
    for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
        for version in bundle_versions(repository, folder.name):
            manifest = json.loads((folder / str(version) / "manifest.json").read_text())
            if manifest["name"] == folder.name:  # the folders of other servers show the same files
                bundle = load_bundle(repository, folder.name, version)
                found.append(model(bundle, manifest))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    a = parser.parse_args()
    bill = packages()
    bill["components"] += models(a.repository)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(bill, indent=1) + "\n")
    print(f"{len(bill['components'])} components -> {a.out}")


if __name__ == "__main__":
    main()
