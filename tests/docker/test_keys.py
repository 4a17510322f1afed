"""What certify.py makes: certificates that hold for the SuperLink alone, and keys that their owner alone can read."""

import importlib.util
import os
import ssl
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from .conftest import ROOT

PROGRAM = ROOT / "docker" / "flower" / "certify.py"
NAMES = ("superlink", "localhost", "127.0.0.1", "::1", "fl.example.org", "10.0.0.7")


@pytest.fixture(scope="module")
def certify():
    """The function."""
    spec = importlib.util.spec_from_file_location("certify", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.certify


@pytest.fixture
def keys(certify, tmp_path):
    """A folder for two nodes."""
    before = os.umask(0)  # the most careless one
    try:
        certify(tmp_path, 2, ["fl.example.org", "10.0.0.7"])
    finally:
        os.umask(before)
    return tmp_path


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shake(keys, name, authority):
    """Lets somebody who trusts an authority meet the SuperLink at a name."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server.load_cert_chain(keys / "superlink" / "certificate.pem", keys / "superlink" / "private.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up, server_hostname=name)]
    for _ in range(4):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[1].version()


@pytest.mark.parametrize("name", NAMES)
def test_the_superlink_is_known_by_each_of_its_names(keys, name):
    assert shake(keys, name, keys / "public" / "ca.pem") == "TLSv1.3"


def test_and_by_no_other_name_and_no_other_authority(certify, keys, tmp_path_factory):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(keys, "other.example.org", keys / "public" / "ca.pem")
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake(keys, "10.0.0.8", keys / "public" / "ca.pem")
    certify(other := tmp_path_factory.mktemp("other"), 1, [])
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake(keys, "superlink", other / "public" / "ca.pem")


def test_who_may_read_what_and_what_is_published_is_no_secret(keys):
    modes = {path.relative_to(keys).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in keys.rglob("*")}
    assert {path for path in modes if "/" not in path} == {
        *["authority", "superlink", "public", "supernode-0", "supernode-1"]
    }
    for path, mode in modes.items():
        assert mode == (0o755 if path == "public" else 0o644) if path.startswith("public") else not mode & 0o077, path
    found = contents(keys)
    private = {content for path, content in found.items() if path.endswith("private.key")}
    assert len(private) == 4 and all(b"PRIVATE KEY" in content for content in private)  # no two are the same
    assert not [path for path, content in found.items() if path.startswith("public") and b"PRIVATE" in content]


def test_a_nodes_keys_belong_together_and_are_of_the_kind_that_flower_takes(keys):
    for name in ("supernode-0", "supernode-1"):
        private = load_ssh_private_key((keys / name / "private.key").read_bytes(), None)
        public = load_ssh_public_key((keys / "public" / f"{name}.pub").read_bytes())
        assert isinstance(private.curve, ec.SECP384R1) and private.public_key() == public
        assert (keys / name / "ca.pem").read_bytes() == (keys / "public" / "ca.pem").read_bytes()


def test_called_again_it_keeps_all_that_there_is_and_adds_what_is_missing(certify, keys):
    before = contents(keys)
    certify(keys, 2, ["fl.example.org"])
    certify(keys, 1, [])
    assert contents(keys) == before
    certify(keys, 3, [])
    after = contents(keys)
    assert after.keys() - before.keys() == {f"supernode-2/{name}" for name in ("ca.pem", "private.key")} | {
        "public/supernode-2.pub"
    }
    assert {path: after[path] for path in before} == before


def test_a_node_that_has_left_with_its_key_gets_no_other_one(certify, keys):
    for path in (keys / "supernode-1").iterdir():
        path.unlink()
    (keys / "supernode-1").rmdir()
    before = contents(keys)
    certify(keys, 2, [])
    assert contents(keys) == before
    # But a public key that was lost is made of the private one.
    (keys / "public" / "supernode-0.pub").unlink()
    certify(keys, 2, [])
    assert contents(keys) == before


def test_no_certificate_is_overwritten(certify, keys):
    before = contents(keys)
    with pytest.raises(ValueError, match="not for 10.0.0.9, and none is overwritten: remove .*superlink"):
        certify(keys, 2, ["10.0.0.9"])
    assert contents(keys) == before
    for path in (keys / "superlink").iterdir():
        path.unlink()
    (keys / "superlink").rmdir()
    certify(keys, 2, ["10.0.0.9"])
    assert shake(keys, "10.0.0.9", keys / "supernode-0" / "ca.pem") == "TLSv1.3"  # nodes trust it without more
    after = contents(keys)
    assert {path for path in before if after[path] != before[path]} == {
        "superlink/certificate.pem",
        "superlink/private.key",
    }


def test_without_its_authority_nothing_is_made(certify, keys):
    (keys / "authority").rename(keys.parent / "elsewhere")
    with pytest.raises(ValueError, match="whose authority is gone"):
        certify(keys, 3, [])
    assert not (keys / "supernode-2").exists()
