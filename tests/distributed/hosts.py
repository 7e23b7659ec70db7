"""Two hosts on one machine: network namespaces with names and addresses of their own, joined by one cable.

Both lie in one user namespace, so that no privilege is needed where users may make such. Each has its own network and
its own hostname; files are the machine's.
"""

import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CABLE = "cable"


def why_no_hosts() -> str:
    """Why this machine lets nobody make namespaces and a cable between them, empty where it does."""
    make = "ip link add cable type veth peer name other"
    try:
        done = subprocess.run(["unshare", "-rmnu", "sh", "-c", make], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of the two: its name, its address, and the process that holds its namespaces."""

    name: str
    address: str
    holder: "subprocess.Popen[bytes]"

    def start(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> "subprocess.Popen[str]":
        """Run a command on this host; all that it says goes to ``log``."""
        with log.open("w") as file:
            return subprocess.Popen(
                [*self._enter(), *words],
                env={**environment, "GLOO_SOCKET_IFNAME": CABLE},
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, *words: str) -> None:
        """Run a command on this host to its end."""
        done = subprocess.run([*self._enter(), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"

    def cut(self) -> None:
        """Pull the cable: nothing is answered any more, and nobody is told."""
        self.run("ip", "link", "set", CABLE, "down")

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-U", "-m", "-n", "-u", "--preserve-credentials"]


@contextmanager
def two_hosts(folder: Path) -> Generator[tuple[Host, Host]]:
    """Hosts ``host-a`` and ``host-b``, which know each other by name; for machines where ``why_no_hosts`` is empty."""
    addresses = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
    holders: list[subprocess.Popen[bytes]] = []
    try:
        hosts = []
        for name, address in addresses.items():
            around = hosts[0]._enter() if hosts else []
            space = ["unshare", "-nu"] if hosts else ["unshare", "-rmnu"]
            holders.append(_holder([*around, *space]))
            hosts.append(Host(name=name, address=address, holder=holders[-1]))
        first, second = hosts
        first.run("mount", "--bind", str(names), "/etc/hosts")
        first.run(*("ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(second.holder.pid)))
        for host in hosts:
            host.run("sh", "-c", f"echo {host.name} > /proc/sys/kernel/hostname")
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", CABLE)
            host.run("ip", "link", "set", CABLE, "up")
            host.run("ip", "link", "set", "lo", "up")
        yield first, second
    finally:
        for holder in reversed(holders):
            holder.kill()
            holder.communicate()


def _holder(around: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A process that does nothing, in namespaces of its own, once it stands there."""
    script = "echo ready; exec cat > /dev/null"  # which ends with the process that holds the other end of its input
    pipe = subprocess.PIPE
    started = subprocess.Popen([*around, "sh", "-c", script], stdin=pipe, stdout=pipe, stderr=pipe)
    assert started.stdout is not None
    assert started.stdout.readline() == b"ready\n", f"{' '.join(around)}: {started.communicate()[1].decode().strip()}"
    return started
