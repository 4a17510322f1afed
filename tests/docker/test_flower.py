"""A Flower federation of containers: the numbers of one process, over TLS, with nodes that are known and few rights."""

import json
import os
import ssl
import time
import urllib.error
import urllib.request

import pytest

import fedsim

from .conftest import FLOWER, OPEN, ROOT, Project, call, lines

pytestmark = pytest.mark.docker
NODES = 3
CHANGES = ("rounds=2", "evaluate_every=2")
USER = str(os.getuid() or 1000)  # containers are nobody's root
STRANGER = f"supernode-{NODES}"
NODE = "--superlink=superlink:8000"
TLS = (NODE, "--root-certificates=/keys/ca.pem")
KNOWN = "--auth-supernode-private-key=/keys/private.key"


@pytest.fixture(scope="module")
def keys(image, tmp_path_factory):
    """Keys for the nodes, and for one whose public key the SuperLink is not told of."""
    folder = tmp_path_factory.mktemp("keys")
    os.chown(folder, int(USER), -1)
    place = Project(f"{image}-keys", image, {"FEDSIM_KEYS": str(folder), "FEDSIM_USER": USER}, (FLOWER,), "runner")
    try:
        said = place.compose("run", "--rm", "certify", "--nodes", str(NODES + 1)).stdout
        assert said.split() == ["made", "/keys/authority", "made", "/keys/superlink"] + [
            word for number in range(NODES + 1) for word in ("made", f"/keys/supernode-{number}")
        ]
        assert place.compose("run", "--rm", "certify").stdout == ""  # again, and nothing is made
    finally:
        place.down()
    (folder / "public" / f"{STRANGER}.pub").rename(folder / "stranger.pub")
    return folder


@pytest.fixture(scope="module")
def settings(keys, tmp_path_factory):
    """Keys, and a folder of data for each node and for the SuperLink."""
    folders = {"": "superlink"} | {f"_{number}": f"supernode-{number}" for number in range(NODES)}
    found = {"FEDSIM_KEYS": str(keys), "FEDSIM_USER": USER}
    for end, owner in folders.items():
        folder = tmp_path_factory.mktemp("data")
        folder.chmod(0o755)
        (folder / f"of-{owner}").touch()
        found[f"FEDSIM_DATA{end}"] = str(folder)
    return found


@pytest.fixture(scope="module")
def federation(image, settings):
    """A SuperLink, and nodes that it knows."""
    place = Project(f"{image}-flower", image, settings, (FLOWER,), "runner")
    try:
        place.compose("up", "--detach", "--wait", *(f"supernode-{number}" for number in range(NODES)))
        yield place
    finally:
        place.down()
        assert not place.left()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The metrics of the same experiment in this process."""
    metrics = fedsim.run("fedavg/digits", changes=CHANGES, root=tmp_path_factory.mktemp("here")).metrics
    assert {"train/loss", "test/accuracy", "clients/accuracy", "bytes_up"} <= metrics[-1].keys()
    assert metrics[-1]["train/loss"] < 0.9 * metrics[0]["train/loss"]  # so each round matters
    return numbers(metrics)


def numbers(metrics):
    """round and name -> number, of all but the time it took."""
    return {(line["round"], name): value for line in metrics for name, value in line.items() if name != "seconds"}


def written(path):
    """What a run wrote down, as `numbers`."""
    return numbers([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()])


def runner(federation, *words, options=()):
    """How the runner ends, and what it says."""
    done = federation.compose("run", "--rm", *options, "runner", *words, check=False)
    return done.returncode, done.stdout + done.stderr


def node(federation, name, *words):
    """How a container ends that is set up as a node, and what it says; None: it goes on, for it has got in."""
    keys = f"{federation.settings['FEDSIM_KEYS']}/{STRANGER}:/keys:ro"
    where = ("--detach", "--no-deps", "--name", f"{federation.name}-{name}", "--volume", keys, "supernode-0")
    federation.compose("run", *where, *words)
    deadline = time.monotonic() + 120
    try:
        while True:
            state = json.loads(call("inspect", "--format", "{{json .State}}", f"{federation.name}-{name}").stdout)
            told = call("logs", f"{federation.name}-{name}")
            said = told.stdout + told.stderr
            if state["Status"] == "exited":
                return state["ExitCode"], said
            if "SuperNode ID:" in said:
                return None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
    finally:
        call("stop", f"{federation.name}-{name}")
        call("rm", f"{federation.name}-{name}")


def containers(federation):
    """What the engine says of each of a federation's containers, by service."""
    there = json.loads(call("inspect", *federation.compose("ps", "--all", "--quiet").stdout.split()).stdout)
    return {each["Config"]["Labels"]["com.docker.compose.service"]: each for each in there}


def inside(federation, service, script, check=True):
    return federation.compose("exec", "-T", service, "sh", "-c", script, check=check).stdout


def test_three_nodes_over_tls_give_the_numbers_of_one_process(federation, expected, tmp_path):
    changes = [word for change in CHANGES for word in ("--set", change)]
    status, said = runner(federation, "fedavg/digits", *changes)
    assert status == 0 and "fedavg-digits 2/2" in said, said
    (path,) = federation.fetch(tmp_path)
    assert written(path) == pytest.approx(expected, rel=1e-5), said
    assert "GridEngine" in (path / "environment.json").read_text() and (path / "report" / "index.html").is_file()
    for number in range(NODES):  # each of them was sent the app, so did some of the work
        assert "fedsim-experiment" in inside(federation, f"supernode-{number}", "ls /tmp/flower/apps")


def test_an_experiment_of_ones_own_travels_to_the_nodes_and_a_failed_run_is_one(federation, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text((ROOT / "experiments" / "fedavg" / "digits.toml").read_text().replace("fedavg-digits", "my-own"))
    own.chmod(0o644)
    options = ("--volume", f"{own}:/home/fedsim/own.toml:ro")
    words = (
        "own.toml",
        "--set",
        "rounds=1",
        "--set",
        'split={use="divide", test=0.5}',
        "--set",
        "clients.train.lr=1e30",
    )
    status, said = runner(federation, *words, options=options)
    assert status == 1 and "finished:failed" in said and "TooFewReplies" in said, said
    assert "holds NaN or infinity" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("fedavg/nope",), "nor a bundled experiment"),
        (("fedavg/digits", "--set", "rounds=0"), "rounds = 0: must be int >= 1"),
        (("fedavg/digits", "--set", 'data.path="a;b"'), "a semicolon separates changes"),
        (("resume", "runs/x"), "is not resumed"),
        (("fedavg/digits", "--out=/tmp"), "runs go to the volume"),
        (("fedavg/digits", "--sets", "rounds=1"), "unrecognized arguments"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_starts(federation, words, told):
    status, said = runner(federation, *words, options=("--no-deps",))
    assert status == 2 and told in said, said


def test_an_interrupted_run_is_stopped(federation):
    federation.compose("run", "--detach", "--name", federation.driver, "runner", "fedavg/digits", "--set", "rounds=500")
    try:
        deadline = time.monotonic() + 120
        while (
            "Start `flwr-serverapp`"
            not in call("logs", federation.driver).stderr + call("logs", federation.driver).stdout
        ):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        call("kill", "--signal", "INT", federation.driver)
        assert lines("wait", federation.driver) == ["130"]
    finally:
        call("rm", "--force", federation.driver)
    listed = (
        "import connection, json",
        "connection.connect(False)",
        "print(connection.flwr('list', '--format', 'json'))",
    )
    where = ("run", "--rm", "--no-deps", "--workdir", "/opt/fedsim/flower", "--entrypoint", "python", "runner", "-c")
    runs = json.loads(federation.compose(*where, "; ".join(listed)).stdout)["runs"]
    assert "finished:stopped" in [run["status"] for run in runs] and "running" not in [run["status"] for run in runs]


def test_who_is_refused_and_that_a_key_that_is_known_gets_in(federation, keys):
    status, said = node(federation, "unknown", *TLS, KNOWN)
    assert status != 0 and "Failed to activate SuperNode" in said
    status, said = node(federation, "keyless", *TLS)
    assert status != 0 and "SuperNode authentication is enabled" in said
    status, said = node(federation, "plain", NODE, "--insecure", "--max-retries=1")
    assert status != 0 and "Server disconnected without sending a response" in said
    status, said = node(federation, "plain-with-key", NODE, "--insecure", KNOWN)
    assert status != 0 and "requires a secure TLS connection" in said
    status, said = node(federation, "deceived", NODE, "--root-certificates=/etc/ssl/certs/ca-certificates.crt", KNOWN)
    assert status != 0 and "CERTIFICATE_VERIFY_FAILED" in said
    # The first of them, with nothing changed but that its key is known.
    (keys / "stranger.pub").rename(keys / "public" / f"{STRANGER}.pub")
    said = federation.compose("run", "--rm", "--no-deps", "register").stdout
    assert said.splitlines() == [f"supernode-{number} may take part" for number in range(NODES + 1)]
    status, said = node(federation, "unknown", *TLS, KNOWN)
    assert status is None and "SuperNode ID:" in said


def test_a_node_may_neither_start_runs_nor_register_others(federation):
    ask = """
import ssl, sys, urllib.error, urllib.request
context = ssl.create_default_context(cafile="/keys/ca.pem")
for path in sys.argv[1:]:
    for headers in ({}, {"X-Forwarded-For": "127.0.0.1"}):
        request = urllib.request.Request("https://superlink:8000" + path, b"", headers)
        try:
            print(path, urllib.request.urlopen(request, context=context).status)
        except urllib.error.HTTPError as error:
            print(path, error.code)
"""
    closed = ["/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-runs", "/v1/runtime/acquire-task"]
    closed += ["/openapi.json", "/v1/fleet/../control/list-runs", "//v1/control/list-runs"]
    said = federation.compose(
        "exec", "-T", "supernode-0", "python", "-c", ask, *closed, "/v1/fleet/pull-messages"
    ).stdout
    found = {(line.split()[0], line.split()[1]) for line in said.splitlines()}
    *refused, served = [code for _, code in sorted(found, key=lambda pair: "pull-messages" in pair[0])]
    assert len(found) == len(closed) + 1  # what it says of itself changes nothing
    assert all(code in ("403", "404") for code in refused) and refused.count("403") >= 5
    assert served not in ("403", "404")
    # There are such paths: they are what the runner uses.
    told = inside(federation, "superlink", f"python -c '{ask.replace('superlink:8000', 'localhost:8000')}' {closed[0]}")
    assert {line.split()[1] for line in told.splitlines()}.isdisjoint({"403", "404"})


def test_containers_have_few_rights(federation):
    found = containers(federation)
    assert found.keys() == {"superlink", "register", *(f"supernode-{number}" for number in range(NODES))}
    for service, each in found.items():
        host = each["HostConfig"]
        assert each["Config"]["User"] == USER and host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"], service
        assert host["SecurityOpt"] == ["no-new-privileges:true"] and not host["Privileged"] and host["Memory"], service
        assert not host["PortBindings"] and not each["NetworkSettings"]["Ports"], service
    for service in found.keys() - {"register"}:
        told = inside(federation, service, "id -u; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status")
        assert told.split() == [USER, "CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"], service
        for place in ("/", "/opt/fedsim", "/keys", "/data"):
            assert inside(federation, service, f"touch {place}/new 2>&1 || true").count("Read-only file system") == 1


def test_each_sees_its_own_data_and_keys_alone(federation, keys, settings):
    found = containers(federation)
    seen = {
        service: {mount["Destination"]: mount["Source"] for mount in each["Mounts"]} for service, each in found.items()
    }
    for number in range(NODES):
        name = f"supernode-{number}"
        assert seen[name] == {"/keys": str(keys / name), "/data": settings[f"FEDSIM_DATA_{number}"]}
        assert inside(federation, name, "ls /data /keys").split() == [
            "/data:",
            f"of-{name}",
            "/keys:",
            "ca.pem",
            "private.key",
        ]
    assert seen["superlink"].keys() == {"/keys", "/data", "/home/fedsim/runs"}
    assert seen["superlink"]["/keys"] == str(keys / "superlink")
    assert seen["register"] == {"/keys": str(keys / "public")}
    # Nobody sees the authority's key, and no private key is seen by two.
    owners = seen.keys() - {"register"}
    private = {inside(federation, service, "cat /keys/private.key") for service in owners}
    assert len(private) == NODES + 1 and (keys / "authority" / "private.key").read_text() not in private


def test_nobody_outside_its_network_reaches_it_unless_it_is_opened(image, settings, federation):
    def reaches(network, address):
        code = f"import socket; socket.create_connection(({address!r}, 8000), 3)"
        where = ("run", "--rm", "--network", network, "--entrypoint", "python", image)
        return call(*where, "-c", code, check=False).returncode == 0

    networks = containers(federation)["superlink"]["NetworkSettings"]["Networks"]
    assert networks.keys() == {f"{federation.name}_flower"}
    (address,) = (each["IPAddress"] for each in networks.values())
    assert reaches(f"{federation.name}_flower", address) and not reaches("bridge", address)
    assert lines("network", "inspect", "--format", "{{.Internal}}", f"{federation.name}_flower") == ["true"]
    opened = Project(f"{image}-open", image, settings | {"PORT": "0"}, (FLOWER, OPEN), "runner")
    try:
        opened.compose("up", "--detach", "--wait", "superlink")
        ((_, bound),) = containers(opened)["superlink"]["NetworkSettings"]["Ports"].items()
        (host, port) = (bound[0]["HostIp"], bound[0]["HostPort"])
        assert len(bound) == 1 and host == "127.0.0.1"
        context = ssl.create_default_context(cafile=f"{settings['FEDSIM_KEYS']}/public/ca.pem")
        assert urllib.request.urlopen(f"https://{host}:{port}/health", context=context, timeout=10).status == 200
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"https://{host}:{port}/v1/control/list-runs", b"", context=context, timeout=10)
        with pytest.raises(OSError, match="closed connection|reset|disconnected|Remote end"):
            urllib.request.urlopen(f"http://{host}:{port}/health", timeout=10)
    finally:
        opened.down()
    assert not opened.left()
