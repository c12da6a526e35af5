"""Reading untrusted files, and writing files that are complete or absent.

All code in the library that reads an external file, or writes one that others rely on, goes through here:
`writing` for atomic writes, `locking` for folders that one process uses at a time, and one reader per format. A reader
raises `UserError` for a file that is damaged, whatever its parser raised, and checks every size that the file claims
before anything is allocated.
"""

from gatewise.files.json import finite_or_null as finite_or_null
from gatewise.files.json import parse_json as parse_json
from gatewise.files.json import read_json as read_json
from gatewise.files.locking import FolderInUseError as FolderInUseError
from gatewise.files.locking import lock_folder as lock_folder
from gatewise.files.regular import read_bytes as read_bytes
from gatewise.files.regular import read_text as read_text
from gatewise.files.regular import require_regular as require_regular
from gatewise.files.writing import atomic_folder as atomic_folder
from gatewise.files.writing import remove_leftovers as remove_leftovers
from gatewise.files.writing import temporary_folder as temporary_folder
from gatewise.files.writing import write_atomically as write_atomically
from gatewise.files.writing import write_json as write_json
from gatewise.files.writing import write_text as write_text
from gatewise.files.yaml import parse_yaml as parse_yaml
from gatewise.files.zip import check_archive as check_archive
from gatewise.files.zip import list_members as list_members
from gatewise.files.zip import read_members as read_members
