"""A store that is away for longer, with the waits and timeouts as they are by default."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from faults.proxy import Fault, Proxy

from pipeline.data import storage
from pipeline.data.storage import s3 as boto

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("kind", ["refuse", "stall", "reset"])
def test_a_stream_outlives_a_store_that_is_away_for_30_s(
    s3: str, moto: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).integers(0, 256, 17 * 2**20, np.uint8).tobytes()
    storage.write_bytes(f"{s3}/big", content)
    monkeypatch.delenv("SECATEUR_STORAGE_BACKOFF_S")
    proxy = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    boto.client.cache_clear()
    back = threading.Timer(30, lambda: setattr(proxy, "fault", None))
    try:
        with storage.open_range(f"{s3}/big") as stream:
            first = stream.read(1000)
            proxy.fault = Fault(kind, times=-1)
            back.start()
            started = time.monotonic()
            assert first + stream.read() == content
        assert 30 <= time.monotonic() - started < 120
        assert proxy.made >= 2
    finally:
        back.cancel()
        proxy.close()
