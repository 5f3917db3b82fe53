#!/usr/bin/env bash
# scikit-learn 1.9.1: temperature scaling takes probabilities that were rounded for logits, and
# then a sample's result depends on the other samples of the call.
#
# CalibratedClassifierCV(method="temperature") knows probabilities by rows that sum to 1 within
# 1e-5, in all rows of a call. Of a classifier whose probabilities have four decimals (a file, or
# float16) some row is always off by 1e-4, so the whole table is scaled as if it were logits: the
# fitted factor is 6.1 instead of 0.71, and the log loss barely falls. A call with one row whose
# sum happens to be 1 takes the logarithm again, with the factor of the other branch.
#
# Seen 2026-11-28, digits, log loss 0.435 before:
#   as computed:   factor 0.710, log loss 0.317; a row alone and in the table differ by 0.000
#   four decimals: factor 6.065, log loss 0.428; a row alone and in the table differ by 0.409
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
fi

"$python" - <<'PY'
import numpy
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss


class Table(ClassifierMixin, BaseEstimator):
    """A classifier whose samples are its probabilities already."""

    def fit(self, rows, labels):
        self.classes_ = numpy.unique(labels)
        return self

    def predict_proba(self, rows):
        return rows

    def predict(self, rows):
        return self.classes_[rows.argmax(1)]


images, labels = load_digits(return_X_y=True)
network = LogisticRegression(max_iter=500).fit(images[:600] / 16, labels[:600])
sure = softmax(3 * network.decision_function(images[600:] / 16), axis=1)  # over-confident
labels = labels[600:]
seen = {}
for name, rows in (("as computed", sure), ("four decimals", sure.round(4))):
    table = FrozenEstimator(Table().fit(rows, labels))
    scaled = CalibratedClassifierCV(table, method="temperature", ensemble=True)
    scaled.fit(rows[:600], labels[:600])
    factor = scaled.calibrated_classifiers_[0].calibrators[0].beta_
    together = scaled.predict_proba(rows[600:])
    alone = numpy.vstack([scaled.predict_proba(row[None]) for row in rows[600:]])
    seen[name] = factor, log_loss(labels[600:], together), abs(alone - together).max()
    print("%s: factor %.3f, log loss %.3f; a row alone and in the table differ by %.3f"
          % (name, *seen[name]))
factor, loss, apart = seen["as computed"]
assert 0.6 < factor < 0.8 and loss < 0.33 and apart < 1e-6
factor, loss, apart = seen["four decimals"]
assert factor > 5 and loss > 0.41 and apart > 0.3
PY
