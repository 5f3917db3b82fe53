#!/usr/bin/env bash
# accelerate 1.15.0: `import accelerate` imports all of Amazon's SDK wherever boto3 is installed, in
# a program that has nothing to do with SageMaker.
#
# accelerate/utils/other.py takes `write_basic_config` from the code of `accelerate config`, whose
# question about SageMaker imports boto3 where it can. boto3 comes along with moto, sagemaker and
# many a company's tools, and then each rank of each job pays: botocore, s3transfer, urllib3, more
# than 100 modules.
#
# Seen 2026-11-30:
#   without boto3: 0 modules of botocore
#   with boto3:    boto3 True, more than 40 modules of botocore
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet accelerate==1.15.0 torch==2.14.1 numpy==2.4.6 boto3==1.43.117
fi

cat >case.py <<'PY'
import sys

if sys.argv[1] == "without":
    sys.modules["boto3"] = None  # as where it is not installed

import accelerate  # noqa: E402, F401

count = sum(name.partition(".")[0] == "botocore" for name in sys.modules)
if sys.argv[1] == "without":
    print(f"without boto3: {count} modules of botocore")
    assert count == 0, count
else:
    there = "boto3" in sys.modules
    print(f"with boto3:    boto3 {there}, more than 40 modules of botocore")
    assert there and count > 40, count
PY
"$python" case.py without
"$python" case.py with
