"""Settings: the file, variables that override it, and refusals; docs and example agree with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.model.errors import Invalid
from insula.model.oidc import OidcSettings
from insula.settings import DOCUMENTED, ENVIRONMENT, Settings, default_of, load

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "insulad.toml"


def read(file: Path, text: str, **environ: str) -> Settings:
    file.write_text(text)
    file.chmod(0o644)  # whatever the umask
    return load(file, environ)


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    assert read(file, "") == Settings()


def test_the_default_file_need_not_exist_but_one_that_is_named_must(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"/absent\.toml: there is no such file; hint: "):
        load(tmp_path / "absent.toml", {})
    with pytest.raises(Invalid, match=r"/absent\.toml: there is no such file; hint: "):
        load(None, {"INSULA_CONFIG": str(tmp_path / "absent.toml")})


def test_every_setting_can_be_set(file: Path) -> None:
    text = """
        root = "/r"
        run = "/x"
        socket = "/s/sock"
        prefix = "own"
        spares = 0
        log_level = "debug"
        ebpf_budgets = false
        [network]
        range4 = "10.99.0.0/16"
        range6 = "fd01::/64"
        resolvers = ["192.0.2.53", "2001:db8::53"]
        floating = ["203.0.113.64/26", "2001:db8:5::/64"]
        [machines]
        hypervisor = "esx://root@esx.example:8443/?no_verify=1"
        password_file = "/etc/insula/esx"
        [audit]
        path = "/a/log"
        size = "64k"
        files = 0
    """
    settings = read(file, text)
    assert (settings.root, settings.run, settings.socket) == (Path("/r"), Path("/x"), Path("/s/sock"))
    assert (settings.prefix, settings.spares, settings.log_level) == ("own", 0, "debug")
    assert not settings.ebpf_budgets and Settings().ebpf_budgets
    assert (settings.network.range4, settings.network.range6) == ("10.99.0.0/16", "fd01::/64")
    assert settings.network.resolvers == ["192.0.2.53", "2001:db8::53"]
    assert settings.network.floating == ["203.0.113.64/26", "2001:db8:5::/64"]
    assert settings.machines.hypervisor == "esx://root@esx.example:8443/?no_verify=1"
    assert settings.machines.password_file == "/etc/insula/esx"
    assert (settings.audit.path, settings.audit.size_bytes, settings.audit.files) == ("/a/log", 64 << 10, 0)


def test_the_socket_follows_the_run_directory(file: Path) -> None:
    assert read(file, 'run = "/x"').socket == Path("/x/insulad.sock")
    assert read(file, 'run = "/x"', INSULA_RUN="/y").socket == Path("/y/insulad.sock")
    assert read(file, 'run = "/x"\nsocket = "/z/s"', INSULA_RUN="/y").socket == Path("/z/s")


def test_the_environment_counts_more_than_the_file(file: Path) -> None:
    text = 'root = "/r"\nrun = "/x"\nprefix = "own"\nspares = 7\nlog_level = "error"'
    own = read(
        file,
        text,
        INSULA_ROOT="/R",
        INSULA_PREFIX="env",
        INSULA_SPARES="3",
        INSULA_SOCKET="/S",
        INSULA_LOG_LEVEL="info",
    )
    assert (own.root, own.run, own.prefix, own.spares) == (Path("/R"), Path("/x"), "env", 3)
    assert (own.socket, own.log_level) == (Path("/S"), "info")
    assert read(file, text, INSULA_SPARES="").spares == 7, "an empty variable is none"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rooot = '/x'", "there is no setting 'rooot'; hint: did you mean root"),
        ("[network]\nrange = '10.0.0.0/8'", "there is no setting 'network.range'; hint: did you mean network.range"),
        ("[audits]\nsize = 1", "there is no setting 'audits'"),
        ("root = 5", "root: expected `str`"),
        ("root = 'relative'", "root 'relative' is not absolute"),
        ("root = '/a/../b'", "root '/a/../b' is not absolute"),
        ("spares = '2'", "spares: expected `int`, got `str`"),
        ("spares = 2.5", "spares: expected `int`, got `float`"),
        ("spares = true", "spares: expected `int`, got `bool`"),
        ("spares = 33", "spares '33' is not a number from 0 to 32"),
        ("spares = -1", "spares '-1' is not a number from 0 to 32"),
        ("prefix = 'Up'", "prefix 'Up' is no prefix"),
        ("prefix = 'a/b'", "prefix 'a/b' is no prefix"),
        ("log_level = 'loud'", "log_level: invalid enum value 'loud'"),
        ("fabric = 'ovs'", "fabric: invalid enum value 'ovs'"),
        ("ebpf_budgets = 'off'", "ebpf_budgets: expected `bool`, got `str`"),
        ("network = 3", "network: expected `object`, got `int`"),
        ("[network]\nrange4 = '10.0.0.1/8'", "network.range4 '10.0.0.1/8' is no network: .*host bits set"),
        ("[network]\nrange4 = 'fd00::/64'", "network.range4 'fd00::/64' is no network"),
        ("[network]\nrange6 = '10.0.0.0/8'", "network.range6 '10.0.0.0/8' is no network"),
        ("[network]\nrange4 = '10.0.0.0/32'", "has no room for a tenant"),
        ("[network]\nrange4 = '0.0.0.0/0'", "can't hold addresses of hosts"),
        ("[network]\nrange4 = '127.0.0.0/8'", "can't hold addresses of hosts"),
        ("[network]\nrange6 = 'fe80::/64'", "can't hold addresses of hosts"),
        ("[network]\nresolvers = ['127.0.0.53']", "network.resolvers '127.0.0.53' can't be asked by tenants"),
        ("[network]\nresolvers = ['dns.example']", "network.resolvers 'dns.example' is no IP address"),
        ("[network]\nresolvers = ['fe80::1']", "can't be asked by tenants"),
        ("[network]\nresolvers = [53]", r"network.resolvers\[0\]: expected `str`, got `int`"),
        ("[network]\nresolvers = '192.0.2.1'", "network.resolvers: expected `array.*`, got `str`"),
        (f"[network]\nresolvers = {['192.0.2.1'] * 9}", "are too many"),
        ("[network]\nfloating = ['203.0.113.7/24']", "network.floating '203.0.113.7/24' is no network"),
        ("[network]\nfloating = ['0.0.0.0/0']", "can't hold external addresses"),
        ("[network]\nfloating = ['127.0.0.0/24']", "can't hold external addresses"),
        ("[network]\nfloating = ['fe80::/64']", "can't hold external addresses"),
        ("[network]\nfloating = ['203.0.113.0/24', '203.0.113.128/25']", "overlaps another range"),
        ("[network]\nfloating = ['100.64.7.0/24']", "overlaps another range, or the uplinks"),
        (f"[network]\nfloating = {[f'203.0.{n}.0/24' for n in range(65)]}", "are too many"),
        ("[[oidc]]\nissuer = 'http://login.example'\nclient_id = 'x'", "oidc.issuer .* is no https URL"),
        ("[[oidc]]\nissuer = 'http://127.0.0.1:1'\nclient_id = 'x'", "oidc.issuer .* is no https URL"),
        ("[[oidc]]\nissuer = 'https://a@login.example'\nclient_id = 'x'", "oidc.issuer .* is no https URL"),
        ("[[oidc]]\nissuer = 'https://x.example/#a'\nclient_id = 'x'", "oidc.issuer .* is no https URL"),
        ("[[oidc]]\nclient_id = 'x'", "oidc.issuer '' is no https URL"),
        ("[[oidc]]\nissuer = 'https://x.example'", "oidc.client_id '' is not 1 to 256"),
        ("[[oidc]]\nissuer = 'https://x.example'\nclient_id = 'x'\nscopes = ['email']", "are no scopes with openid"),
        ("[[oidc]]\nissuer = 'https://x.example'\nclient_id = 'x'\nca = 'ca.pem'", "oidc.ca 'ca.pem' is not absolute"),
        ("[[oidc]]\nissuer = 'https://x.example'\nclient_id = 'x'\nname = 'A:b'", "oidc.name 'A:b' is no name"),
        ("[[oidc]]\nisuer = 'https://x.example'", "there is no setting 'oidc.isuer'; hint: did you mean oidc.issuer"),
        ("[[oidc]]\nissuer = 'https://x.example'\nclient_id = 'x'\n" * 2, "oidc.name 'oidc' is there twice"),
        ("[oidc]\nissuer = 'https://x.example'", "oidc: expected `array`"),
        ("[machines]\nhypervisor = 'vbox'", "machines.hypervisor 'vbox' is no hypervisor"),
        (
            "[machines]\nhypervisor = 'esx://root:secret@h/'",
            "machines.hypervisor .* is no hypervisor; hint: .*password",
        ),
        ("[machines]\npassword_file = 'secret'", "machines.password_file 'secret' is not absolute"),
        ("[audit]\nsize = '10'", "audit.size '10' is too small"),
        ("[audit]\nsize = 'much'", "audit.size 'much' is no size"),
        ("[audit]\nfiles = 1001", "audit.files '1001' is not a number from 0 to 1000"),
        ("[audit]\npath = 'audit.log'", "audit.path 'audit.log' is not absolute"),
        ("root = '/a'\nroot = '/b'", "it is not TOML"),
        ("root =", "it is not TOML"),
        ("\x00", "it is not TOML"),
        ("[" * 5000, "it is not TOML"),
        ("#" + "x" * (1 << 20), "it is larger than 1048576 bytes"),
    ],
)
def test_errors_are_one_line_with_the_name_of_the_file(file: Path, text: str, complaint: str) -> None:
    with pytest.raises(Invalid) as caught:
        read(file, text)
    assert re.match(re.escape(f"{file}: ") + ".*" + complaint, str(caught.value)), caught.value
    assert caught.value.hint and str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("INSULA_ROOT", "relative", "INSULA_ROOT 'relative' is not absolute"),
        ("INSULA_PREFIX", "too-long-a-prefix", "INSULA_PREFIX 'too-long-a-prefix' is no prefix"),
        ("INSULA_SPARES", "many", "INSULA_SPARES 'many' is not a number from 0 to 32"),
        ("INSULA_SPARES", "33", "INSULA_SPARES '33' is not a number from 0 to 32"),
        ("INSULA_SPARES", "²", "INSULA_SPARES '²' is not a number from 0 to 32"),
        ("INSULA_LOG_LEVEL", "loud", "INSULA_LOG_LEVEL: invalid enum value 'loud'"),
    ],
)
def test_an_error_in_a_variable_names_the_variable(file: Path, name: str, value: str, complaint: str) -> None:
    file.write_text("")
    file.chmod(0o644)
    with pytest.raises(Invalid) as caught:
        load(file, {name: value})
    assert str(caught.value).startswith(complaint)


def test_a_file_that_is_no_text(file: Path) -> None:
    file.write_bytes(b'root = "\xff"')
    file.chmod(0o644)
    with pytest.raises(Invalid, match="it is not UTF-8"):
        load(file, {})
    for other in (file.parent, Path("/dev/zero")):
        with pytest.raises(Invalid, match="it is no regular file"):
            load(other, {})
    fifo = file.with_name("fifo")
    os.mkfifo(fifo)
    with pytest.raises(Invalid, match="it is no regular file"):
        load(fifo, {})


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o600])
def test_others_may_not_write_to_the_file(file: Path, mode: int) -> None:
    file.write_text("spares = 3")
    file.chmod(mode)
    if mode & 0o022:
        with pytest.raises(Invalid, match="others may write to it; hint: chmod go-w"):
            load(file, {})
    else:
        assert load(file, {}).spares == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_file_is_of_root_or_of_its_reader(file: Path) -> None:
    file.write_text("spares = 3")
    file.chmod(0o600)
    os.chown(file, 65534, -1)
    with pytest.raises(Invalid, match="it belongs to user 65534, who could change it; hint: chown root"):
        load(file, {})


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=20) | st.integers() | st.lists(st.integers()), max_size=4))
def test_any_keys_are_read_or_invalid(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    from insula.settings import _checked

    try:
        _checked(data, "file", {})  # type: ignore[arg-type]
    except Invalid as error:
        assert error.hint


def test_directories_are_for_root_alone(file: Path, tmp_path: Path) -> None:
    own = read(file, f'root = "{tmp_path / "r"}"\nrun = "{tmp_path / "x"}"')
    assert own.state == tmp_path / "r" / "state.db"
    own.make()
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o711


def fields() -> set[str]:
    found = set(Settings.__struct_fields__) - {"network", "audit", "api", "quotas", "storage", "machines", "oidc"}
    for table in ("network", "audit", "api", "quotas", "storage", "machines"):
        found |= {f"{table}.{name}" for name in getattr(Settings(), table).__struct_fields__}
    found |= {f"oidc.{name}" for name in OidcSettings.__struct_fields__}
    return found


def test_every_setting_is_documented() -> None:
    assert {setting.key for setting in DOCUMENTED} == fields()
    rows = re.findall(
        r"^\| `([a-z_.0-9]+)` \| (.+?) \| (.+?) \| (.*?) ?\| ", (REPOSITORY / "docs/settings.md").read_text(), re.M
    )
    assert {key for key, *_ in rows} == fields()
    variables = {key: name for name, key in ENVIRONMENT.items()}
    for key, default, takes, variable in rows:
        assert takes == next(setting.takes for setting in DOCUMENTED if setting.key == key)
        assert variable.strip("`") == variables.get(key, ""), key
        if key not in ("socket", "users_socket", "network.resolvers", "oidc.issuer", "oidc.client_id"):
            assert default == f"`{default_of(key)}`"


def test_the_example_has_every_default() -> None:
    text = (REPOSITORY / "packaging/insulad.toml").read_text()
    assert tomllib.loads(text) == {}
    opened = re.sub(r"^# (?=\[|[a-z_0-9]+ = )", "", text, flags=re.M)
    data = tomllib.loads(opened)
    assert data["network"].pop("resolvers")
    [provider] = data.pop("oidc")
    assert provider.pop("issuer") and provider.pop("client_id")
    flat = {f"{k}.{n}": v for k, t in data.items() if isinstance(t, dict) for n, v in t.items()}
    flat |= {f"oidc.{key}": value for key, value in provider.items()} | {"oidc.issuer": "", "oidc.client_id": ""}
    flat |= {key: value for key, value in data.items() if not isinstance(value, dict)}
    assert {*flat, "network.resolvers"} == fields()
    assert all(
        str(default_of(key)) == (str(value).lower() if isinstance(value, bool) else str(value))
        for key, value in flat.items()
    )


def insulad(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "insula.api.daemon", *words]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environ})


def test_check_says_whether_the_settings_can_be_used(file: Path) -> None:
    file.write_text("spares = 3\n")
    file.chmod(0o644)
    right = insulad("--check", "--config", str(file))
    assert (right.returncode, right.stderr) == (0, "")
    file.write_text("spare = 3\n")
    wrong = insulad("--check", INSULA_CONFIG=str(file))
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert (
        wrong.stderr == f"error: {file}: there is no setting 'spare'; hint: did you mean spares? see insulad.toml(5)\n"
    )
    assert insulad("--check", "--log-level", "loud", "--config", str(file)).returncode == 2
