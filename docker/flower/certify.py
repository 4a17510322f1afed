"""Makes the certificates and keys of a federation in a folder, each of whose parts is for one container.

    authority/    certificate and key of the authority, which only this program reads
    superlink/    the SuperLink's certificate and key, and the authority's certificate
    supernode-0/  the key of the first node, and the authority's certificate; and so on
    public/       what is no secret: the authority's certificate, and the public key of each node that may take part

What is there is kept: called again, it adds the nodes that are missing. Private keys can be read by their owner alone.

Certificates are X.509 of elliptic curves, P-256; nodes' keys are P-384 in OpenSSH's format, as Flower wants them.
"""

import argparse
import ipaddress
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load
from cryptography.hazmat.primitives.serialization import load_ssh_private_key as load_ssh
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOSTS = ("superlink", "localhost", "127.0.0.1", "::1")  # in compose.flower.yaml, and in the SuperLink's container
YEARS = {"authority": 10, "superlink": 2}
CA, CERTIFICATE, KEY = "ca.pem", "certificate.pem", "private.key"


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key of a certificate."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def named(host: str) -> x509.GeneralName:
    """An address or a name, as a certificate has it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def begun(role: str, key: ec.EllipticCurvePublicKey, issuer: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    """A certificate but for what it may be used for."""
    now, name = datetime.now(UTC), NameOID.COMMON_NAME
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(name, f"fedsim {role}")]))
        .issuer_name(x509.Name([x509.NameAttribute(name, "fedsim authority")]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=365 * YEARS[role]))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        .add_extension(x509.BasicConstraints(ca=role == "authority", path_length=None), critical=True)
        .add_extension(usage(signs=role == "authority"), critical=True)
    )


def usage(signs: bool) -> x509.KeyUsage:
    """An authority signs certificates; all others only what they say."""
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def authority() -> dict[str, bytes]:
    """A new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = begun("authority", key.public_key(), key.public_key()).sign(key, hashes.SHA256())
    return {CA: certificate.public_bytes(Encoding.PEM), KEY: pem(key)}


def node() -> bytes:
    """A new private key of a node."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def superlink(folder: Path, hosts: list[str]) -> dict[str, bytes]:
    """A key for the SuperLink, and the certificate of the authority in this folder that it is at these hosts."""
    signing, key = load((folder / KEY).read_bytes(), None), ec.generate_private_key(ec.SECP256R1())
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{folder / KEY} is a {type(signing).__name__}, must be the key that was made here")
    certificate = (
        begun("superlink", key.public_key(), signing.public_key())
        .add_extension(x509.SubjectAlternativeName([named(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signing, hashes.SHA256())
    )
    return {CA: (folder / CA).read_bytes(), CERTIFICATE: certificate.public_bytes(Encoding.PEM), KEY: pem(key)}


def lay(folder: Path, files: dict[str, bytes]) -> None:
    """Writes a folder that its owner alone can open, whole or not at all."""
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        for name, content in files.items():
            with open(os.open(part / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    print(f"made  {folder}")


def publish(path: Path, content: bytes) -> None:
    """Writes what everybody may read."""
    path.parent.mkdir(mode=0o755, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o644)


def certified(folder: Path) -> set[str]:
    """The hosts at which the SuperLink may be, by its certificate."""
    certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def certify(folder: Path, nodes: int, hosts: list[str]) -> None:
    """Makes what is missing for a SuperLink at these hosts, besides those that it always has, and so many nodes.

    Raises:
        ValueError: there is a certificate for other hosts, or one whose authority is gone.
    """
    wanted, made = list(dict.fromkeys([*HOSTS, *hosts])), folder / "superlink"
    if not (folder / "authority").exists():
        if made.exists():
            raise ValueError(f"{folder} has a SuperLink whose authority is gone: remove the folder, or bring it back")
        lay(folder / "authority", authority())
    if not made.exists():
        lay(made, superlink(folder / "authority", wanted))
    elif missing := {str(named(host).value) for host in wanted} - certified(made):
        raise ValueError(
            f"the SuperLink's certificate is not for {', '.join(sorted(missing))}, and none is overwritten: "
            f"remove {made} to have another one made; nodes keep their keys"
        )
    ca = (folder / "authority" / CA).read_bytes()
    publish(folder / "public" / CA, ca)
    for name in (f"supernode-{number}" for number in range(nodes)):
        public = folder / "public" / f"{name}.pub"
        if public.exists():  # its private key may be elsewhere
            continue
        if not (folder / name).exists():
            lay(folder / name, {CA: ca, KEY: node()})
        key = load_ssh((folder / name / KEY).read_bytes(), None)
        publish(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Makes the certificates and keys of a federation; keeps what is there."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, required=True, help="how many nodes have a key")
    parser.add_argument(
        "--hosts", nargs="*", default=[], help="more names and addresses at which nodes reach the SuperLink"
    )
    asked = parser.parse_args()
    try:
        certify(asked.folder, asked.nodes, asked.hosts)
    except (OSError, ValueError) as error:
        owner = f"; the folder must belong to the user {os.getuid()}" if isinstance(error, PermissionError) else ""
        sys.exit(f"Error: {error}{owner}")


if __name__ == "__main__":
    main()
