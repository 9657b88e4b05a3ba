"""timm's own tests of its models, from its source distribution. `.ci/timm-common` fetches it and runs them on ours."""

import os

# TIMM_TESTS is the folder `tests` of the source distribution.
collect_ignore = [] if "TIMM_TESTS" in os.environ else ["test_common_timm.py"]
