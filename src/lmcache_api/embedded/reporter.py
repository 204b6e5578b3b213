"""A worker's reports to the embedded controller: that it is there, where, and how many chunks it holds."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import urllib.parse
from typing import Any

from lmcache_api.embedded.calls import ask
from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_api.embedded.periodic_threads import FailedRun, PeriodicThread
from lmcache_shared.address import Address, TcpAddress, parse
from lmcache_shared.errors import AddressError, ConfigError
from lmcache_shared.placement import CONTROLLER_INDEX, place
from lmcache_shared.settings import Settings

logger = logging.getLogger(__name__)

REPORTS_A_TIMEOUT = 3
SHORTEST, LONGEST = 0.1, 3600.0
"""Timeouts of a controller, in seconds; as the setting."""

REPORT_SECONDS = 3.0
PART_OF_AN_INTERVAL = 2 / 3
"""A report has this part of the time between two, so that a controller that hangs makes no worker look stalled
(`ACTIVE_INTERVALS`): from the begin of one report to the end of the next it is 2 1/3 intervals."""

LEAVE_SECONDS = 0.5
ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


def controller_address(settings: Settings) -> Address:
    """Where the controller of these settings serves.

    Raises:
        ConfigError: `controller_address` is no address.
    """
    text = settings.controller_address
    if text is None:
        address = place(settings, CONTROLLER_INDEX).address
        is_any = isinstance(address, TcpAddress) and address.host in ANY_HOST
        return TcpAddress("127.0.0.1", settings.controller_port) if is_any else address
    try:
        return parse(text)
    except AddressError as error:
        raise ConfigError(f"controller_address: {error}") from None


class ControllerReporter(PeriodicThread):
    """Reports at an interval; what goes wrong is a failed run, told once, and the next one tries again.

    Args:
        controller: where it is.
        instance_id: the worker's deployment.
        worker_id: its number.
        address: where it is asked.
        engine: whose chunks are counted.
        interval: seconds between two reports, until the controller says how often it wants them.
        token: shown to the controller, which asks callers on other machines for one.
    """

    def __init__(
        self,
        controller: Address,
        *,
        instance_id: str,
        worker_id: int,
        address: Address,
        engine: EmbeddedEngine,
        interval: float,
        token: str | None = None,
    ) -> None:
        super().__init__("controller-reporter-thread", interval=interval, level="high")
        self._controller = controller
        self._engine = engine
        self._token = token
        self._known = False
        self._silent = False
        self._worker: dict[str, Any] = {"instance_id": instance_id, "worker_id": worker_id}
        self._where: dict[str, Any]
        if not isinstance(address, TcpAddress):
            self._where = {"port": address.path}
        elif address.host in ANY_HOST or not _is_number(address.host):  # the controller sees where it is called from
            self._where = {"port": str(address.port)}
        else:
            self._where = {"host": address.host, "port": str(address.port)}

    def run_once(self) -> tuple[str, dict[str, str]]:
        keys = self._engine.chunks
        report = {**self._worker, **self._where, "key_count": keys}
        try:
            seconds = min(REPORT_SECONDS, PART_OF_AN_INTERVAL * self.interval)
            answer = ask(self._controller, "POST", "/controller/workers", report, seconds=seconds, token=self._token)
        except OSError as error:
            if not self._silent:
                logger.warning(
                    "worker %d: cannot report to the controller at %s: %s",
                    self._worker["worker_id"],
                    self._controller,
                    error,
                )
            self._known, self._silent = False, True
            raise FailedRun(str(error)) from None
        if self._silent:
            logger.info("worker %d: the controller at %s is there", self._worker["worker_id"], self._controller)
        self._known, self._silent = True, False
        timeout = answer.get("timeout_seconds")
        if isinstance(timeout, int | float) and SHORTEST <= timeout <= LONGEST:
            self.interval = timeout / REPORTS_A_TIMEOUT
        return f"Reported {keys} keys to {self._controller}", {"key_count": str(keys)}

    def stop(self) -> None:
        """End, and tell the controller, which otherwise forgets this worker by itself."""
        super().stop()
        if not self._known or self.is_running:  # one that has not answered this report will not answer more
            return
        with contextlib.suppress(OSError):
            query = urllib.parse.urlencode(self._worker)
            ask(self._controller, "DELETE", f"/controller/workers?{query}", seconds=LEAVE_SECONDS, token=self._token)


def _is_number(host: str) -> bool:
    """Whether it is an IP address and no name, which the controller may know otherwise or not at all."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
