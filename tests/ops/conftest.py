import pytest

from e3va.cache import warn_once
from e3va.ops import dispatch, trial, verdicts
from e3va.ops.backends import reference
from e3va.ops.backends.registry import IMPLEMENTATIONS, Implementation
from tests.ops.trials import OP


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Call it with a kernel, its seconds where the reference takes one, and a reference."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "TRIED_ON", {"cpu"})

    def restart():
        dispatch.forget()
        verdicts._memory.clear()
        warn_once.cache_clear()

    def install(kernel, seconds=0.5, other=reference.sublayer_epilogue):
        def timed(run, device, arguments):
            run(*arguments)
            return 1.0 if run is other else seconds

        monkeypatch.setattr(trial, "_seconds", timed)
        backends = IMPLEMENTATIONS[OP]
        kernel = Implementation(kernel, lambda *_: None, lambda *_: None)
        monkeypatch.setitem(backends, "triton", kernel)
        monkeypatch.setitem(backends, "native", kernel._replace(why_not=lambda *_: "not here"))
        monkeypatch.setitem(backends, "reference", backends["reference"]._replace(run=other))
        restart()

    install.restart = restart
    yield install
    restart()
