"""torchvision can be imported after vilex, whatever torch it was built for."""

import subprocess
import sys

from vilex import compat


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_torchvision_works_after_vilex():
    code = (
        "import vilex, torch; from torchvision.transforms.functional import hflip; print(hflip(torch.eye(2)).tolist())"
    )
    assert run_python(code) == "[[0.0, 1.0], [1.0, 0.0]]"


def test_a_second_call_does_nothing():
    assert compat.declare_torchvision_ops() is False


def test_nothing_is_declared_when_torchvision_loads(monkeypatch):
    monkeypatch.setattr(compat, "_libraries", [])
    monkeypatch.setattr(compat, "_torchvision_loads", lambda: True)
    assert compat.declare_torchvision_ops() is False
    assert compat._libraries == []


def test_an_absent_torchvision_counts_as_working(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    assert compat._torchvision_loads()


def test_an_extension_that_does_not_load_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: spec)
    assert not compat._torchvision_loads()
