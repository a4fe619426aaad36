"""Files of jobs: sweeps in YAML or JSON, tables in JSONL or CSV. All of a file is checked, and every error located.

A sweep file has `name`, `defaults` (fields of a job), `matrix` (axes that multiply), `zip` (axes that advance together),
`include`, `exclude`, `items` (rows) or `rows` (the name of a table beside it), `wildcards`, and fields of the whole job
such as `order` or `priority`. A table has one image a line; its rows are streamed into the store, however many.
"""

from latentfarm.jobfiles.located import InvalidRows, RowError
from latentfarm.jobfiles.reader import JobFile, read_job_file

__all__ = ["InvalidRows", "JobFile", "RowError", "read_job_file"]
