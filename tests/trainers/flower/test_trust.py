"""With the commands of the guide, a SuperLink gives something only to a node whose key is registered."""

import functools
import inspect
import json
import re
import shlex
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


pytest.importorskip("flwr")

import httpx
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.routers.control.router import router as control
from flwr.superlink.routers.fleet.router import router as fleet
from flwr.supernode import fleet_http_client

from peft_ravan.trainers.demo.loopback import free_port

from ...markdown import code_blocks, section
from .loopback import NEEDS_PROCESSES, Loopback


GUIDE = section((Path(__file__).parents[3] / "docs" / "flower.md").read_text(), "Security")
MAKE_CERTIFICATES, START_THE_LINK, MAKE_A_KEY, REGISTER, START_A_NODE = code_blocks(GUIDE, "sh")
[PROXY] = code_blocks(GUIDE, "nginx")

# an app that needs nothing but Flower
APP = {
    "pyproject.toml": """
[project]
name = "who-is-there"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "example"
fab-include = ["app.py"]

[tool.flwr.app.components]
clientapp = "app:client"
serverapp = "app:server"

[tool.flwr.app.config]
output-dir = ""
""",
    "app.py": """
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def introduce(message, context):
    return Message(RecordDict({"node": ConfigRecord({"name": context.node_config["client-name"]})}), reply_to=message)


@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    names = [answer.content["node"]["name"] for answer in grid.send_and_receive(questions)]
    Path(context.run_config["output-dir"], "names.json").write_text(json.dumps(names))
""",
}


def is_there(command: str, *start: str) -> bool:
    if shutil.which(command) is None:
        return False
    return subprocess.run([command, "version"], capture_output=True, text=True).stdout.startswith(start)


pytestmark = [
    *NEEDS_PROCESSES,
    pytest.mark.skipif(not is_there("openssl", "OpenSSL 3"), reason="the commands of the guide need OpenSSL 3"),
    pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="the commands of the guide need ssh-keygen"),
]


class Guarded(Loopback):
    """A SuperLink that is started with the commands of the guide, one registered node, and one that is a stranger."""

    def here(self, command: str) -> str:
        """A command of the guide with the address of this SuperLink, which nodes reach without a proxy."""
        port = self.address.split(":")[1]
        return command.replace("\\\n", "").replace("flower.example.org:8443", self.address).replace("8000", port)

    def prepare(self, commands: str) -> None:
        subprocess.run(["bash", "-ec", self.here(commands)], env=self.environment, cwd=self.folder, check=True)

    def start_node(self, name: str) -> subprocess.Popen:
        command = shlex.split(self.here(START_A_NODE).replace("north", name))
        return self._start(*command, "--port", str(free_port()))

    def _start_all(self) -> None:
        self.prepare(MAKE_CERTIFICATES)
        self._start(*shlex.split(self.here(START_THE_LINK)))

    def start_stranger(self) -> subprocess.Popen:
        """A node with a key that is not registered."""
        self.prepare(MAKE_A_KEY.replace("north", STRANGER))
        return self.start_node(STRANGER)


@dataclass
class Seen:
    """What happened to the nodes."""

    names: list[str]  # of those that the app has reached
    listed: list[dict]
    refused: dict[str, int]  # the answers to requests that nobody has signed, by their paths
    without_tls: str  # the error of a request that is not encrypted
    logs: dict[str, str]


STRANGER = "without-registration"
# what a node says that is not let in, and one that is
REFUSED, LET_IN = "The SuperNode could not establish a connection", "SuperNode ID"


def is_decided(guarded: Guarded, process: subprocess.Popen) -> bool:
    log = guarded.log(process)
    return REFUSED in log or LET_IN in log


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Seen:
    folder = tmp_path_factory.mktemp("trust")
    app = folder / "who-is-there"
    app.mkdir()
    for name, text in APP.items():
        (app / name).write_text(text)
    with Guarded(folder / "flower", num_nodes=0) as guarded:
        stranger = guarded.start_stranger()
        guarded.prepare(MAKE_A_KEY + REGISTER)
        north = guarded.start_node("north")
        run = guarded.start_run(app, output_dir=str(folder))
        guarded.wait_until((folder / "names.json").exists, run)
        guarded.wait_for_the_end(run)
        guarded.wait_until(functools.partial(is_decided, guarded, stranger))
        logs = {"north": guarded.log(north), STRANGER: guarded.log(stranger)}
        refused, without_tls = unsigned_requests(guarded), request_without_tls(guarded)
        listed = json.loads(guarded.output("flwr", "supernode", "list", "here", "--format", "json"))
    return Seen(json.loads((folder / "names.json").read_text()), listed["nodes"], refused, without_tls, logs)


def unsigned_requests(guarded: Guarded) -> dict[str, int]:
    headers = {"Content-Type": PROTOBUF_MEDIA_TYPE}
    trusted = ssl.create_default_context(cafile=guarded.folder / "ca.crt")
    with httpx.Client(base_url=f"https://{guarded.address}", headers=headers, verify=trusted) as client:
        return {route.path: client.post(route.path, content=b"").status_code for route in fleet.routes}


def request_without_tls(guarded: Guarded) -> str:
    try:
        return f"answered with {httpx.get(f'http://{guarded.address}{fleet.routes[0].path}').status_code}"
    except httpx.TransportError as error:
        return type(error).__name__


def test_a_registered_node_takes_part(seen):
    assert seen.names == ["north"]
    assert "Receiving: query message" in seen.logs["north"]


def test_a_node_that_is_not_registered_gets_nothing(seen):
    assert len(seen.listed) == 1 and seen.listed[0]["status"] == "online"
    log = seen.logs[STRANGER]
    assert REFUSED in log and LET_IN not in log and "Receiving" not in log, log


def test_nothing_is_answered_that_is_not_signed_or_not_encrypted(seen):
    assert len(seen.refused) > 10 and set(seen.refused.values()) == {401}
    assert "answered" not in seen.without_tls


def test_the_proxy_lets_what_nodes_need_through_and_nothing_else():
    """Whoever reaches the control API could start a run, which is code."""
    [[let_through, target], [rest, answer]] = re.findall(r"location (\S+) {\s+(?:proxy_pass|return) (\S+);", PROXY)
    used = set(re.findall(r'"(/v1/[^"]+)"', inspect.getsource(fleet_http_client)))
    assert used and used <= {route.path for route in fleet.routes}
    assert all(path.startswith(let_through) for path in used) and (rest, answer) == ("/", "403")
    assert not any(route.path.startswith(let_through) for route in control.routes)
    # nothing but the proxy is reached from outside
    assert "--host 127.0.0.1 --port 8000" in START_THE_LINK and target == "https://127.0.0.1:8000"
