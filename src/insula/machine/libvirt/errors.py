"""The library's errors as Insula's.

An error of libvirt has a code and a text. The driver for ESXi has one code for nearly all: what went wrong is in the
text, as curl's number (https://curl.se/libcurl/c/libcurl-errors.html) or as a fault of ESXi's.
"""

from __future__ import annotations

import re
from typing import Any, Final

from insula.model.errors import Conflict, Failed, InsulaError, Invalid, NotFound, Unavailable

_NO_SUPPORT: Final = (3, 67, 74, 84)  # NO_SUPPORT, CONFIG_, ARGUMENT_, OPERATION_UNSUPPORTED
_NO_DOMAIN, _MISSING_DEVICE = 42, 99
_AUTHENTICATION = (29, 45, 79, 88, 94)  # OPERATION_DENIED, AUTH_FAILED, AUTH_CANCELLED, ACCESS_DENIED, AUTH_UNAVAILABLE
_WRONG_STATE = 55  # OPERATION_INVALID
_WRONG_INPUT = (8, 27, 35, 92)  # INVALID_ARG, XML_ERROR, XML_DETAIL, XML_INVALID_SCHEMA
_LOST = (5, 38, 39, 68, 95)  # NO_CONNECT, SYSTEM_ERROR, RPC, OPERATION_TIMEOUT, NO_SERVER
_CURL = re.compile(r"curl_easy_perform\(\) returned an error: (?P<text>.*?) \((?P<code>\d+)\)")
_CERTIFICATE = (51, 58, 60, 77, 83, 91)  # PEER_FAILED_VERIFICATION before and after 7.62, and what else is about it
_PASSWORD = re.compile("incorrect user ?name or password|InvalidLogin")
_NO_DRIVER = re.compile("state driver is not active|no connection driver available")
_EXISTS = re.compile("already exists with uuid|already defined with uuid|is already active|already running")
_LONGEST = 300


def translate(error: Any, name: str, guest: str = "") -> InsulaError:
    """The error of a call to the hypervisor `name` about a guest."""
    code, text = error.get_error_code(), _line(error.get_error_message() or str(error))
    of = f"{name}: {guest}" if guest else name
    if code == _NO_DOMAIN:
        return NotFound(f"{name} has no guest {guest}", "`virsh list --all` shows those that it has")
    if code == _MISSING_DEVICE:
        return NotFound(f"{of}: {text}")
    if code == _WRONG_STATE or _EXISTS.search(text):
        return Conflict(f"{of}: {text}", "look at the state of the guest")
    if code in _NO_SUPPORT:
        return Unavailable(f"{of}: this hypervisor can't do that: {text}")
    if code in _WRONG_INPUT:
        return Invalid(f"{of}: {text}")
    return connection_error(code, text, name) or Failed(f"{of}: {text}")


def connection_error(code: int | None, text: str, name: str) -> InsulaError | None:
    """Why the hypervisor can't be used; None if the error is about something else."""
    if code in _AUTHENTICATION or _PASSWORD.search(text):
        hint = "see the user in machines.hypervisor, and machines.password_file"
        return Unavailable(f"{name} refuses the user name or the password: {text}", hint)
    if found := _CURL.search(text):
        if int(found["code"]) in _CERTIFICATE:
            hint = "have its certificate signed by an authority that this host trusts (update-ca-certificates)"
            return Unavailable(f"the certificate of {name} is not valid: {found['text']}", hint)
        return Unavailable(f"{name} can't be reached: {found['text']}", "is it on, and is the address right?")
    if code in _LOST or _NO_DRIVER.search(text):
        return Unavailable(f"{name} can't be reached: {text}", _hint(name))
    return None


def _hint(name: str) -> str:
    if name.startswith("xen:"):
        return "in domain 0 of Xen, install libvirt-daemon-driver-xen and start libvirtd"
    return "is it on, and is the address right?"


def _line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST]
