# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo.refit.cli``."""

from dynamo.refit.cli import main

if __name__ == "__main__":
    main()
