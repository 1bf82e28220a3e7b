"""Peers of the serving bench that a machine may lack."""

from pathlib import Path

import pytest

from bench.servers import NotInstalled, install


def test_a_peer_that_cannot_be_built_here_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotInstalled, match="llama_cpp cannot be installed: there is no cmake"):
        install("llama_cpp", tmp_path)
