"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# how fast a machine happens to be proves nothing about the code
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# what is started here would inherit it from a `nohup` around the tests, and stay where it is told to leave
signal.signal(signal.SIGHUP, signal.SIG_DFL)
