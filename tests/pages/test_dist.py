"""The wheel, built and tried in an environment of its own, as `make dist` does."""

import subprocess
import tarfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]


def test_the_wheel_trains_and_merges(tmp_path):
    done = subprocess.run([ROOT / ".ci/dist", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  train " in done.stdout and "  portable " in done.stdout
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = ZipFile(wheel).namelist()
    assert "qlora/apps/report.html" in names and "qlora/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qlora"}
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())
