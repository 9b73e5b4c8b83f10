"""
tidelog_client: a replica that can always be worked on, and synchronizes when it can.

Open a `Replica`.
"""

from tidelog._channel import ClientTls
from tidelog_client._commit import Transaction
from tidelog_client._file_wishes import FileDownload, FileMode
from tidelog_client._files import FileState
from tidelog_client._object import Object
from tidelog_client._replica import LoggedOperation, Replica
from tidelog_client._report import Failures, Phase, Progress, Report, Skipped, SkipReason
from tidelog_client._set_aside import SetAside

__all__ = [
    "ClientTls",
    "Failures",
    "FileDownload",
    "FileMode",
    "FileState",
    "LoggedOperation",
    "Object",
    "Phase",
    "Progress",
    "Replica",
    "Report",
    "SetAside",
    "SkipReason",
    "Skipped",
    "Transaction",
]
