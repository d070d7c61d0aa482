"""Certificates for TLS tests."""

import subprocess
from pathlib import Path

from harness.processes import need


def make_certificates(directory: Path, name: str = "ca") -> dict[str, str]:
    """Make a certificate authority and a certificate for 127.0.0.1; return the paths of both and of their keys."""
    files = {part: str(directory / f"{name}-{part}.pem") for part in ("ca", "ca-key", "certificate", "key")}
    new = [need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    config = directory / "openssl.cnf"
    config.write_text(
        "[req]\ndistinguished_name = name\n[name]\n"
        "[ca]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\nsubjectKeyIdentifier = hash\n"
        "[server]\nsubjectAltName = IP:127.0.0.1, DNS:localhost\nsubjectKeyIdentifier = hash\n"
        "authorityKeyIdentifier = keyid\n"
    )
    new += ["-config", str(config), "-days", "2"]
    ca, key = ["-out", files["ca"], "-keyout", files["ca-key"]], ["-out", files["certificate"], "-keyout", files["key"]]
    signed = ["-CA", files["ca"], "-CAkey", files["ca-key"]]
    subprocess.run([*new, "-extensions", "ca", "-subj", f"/CN={name}", *ca], check=True, capture_output=True)
    subprocess.run(
        [*new, "-extensions", "server", "-subj", "/CN=service", *key, *signed], check=True, capture_output=True
    )
    return files
