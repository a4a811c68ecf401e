"""`outrider`, whose launcher restarts workers without end: here they are killed more often than in
life, where a worker that dies again and again is to stay down.
"""

from __future__ import annotations

from outrider_services.__main__ import main
from outrider_services.pipeline import launcher

launcher.RESTARTS = (1000, 1.0)

if __name__ == "__main__":
    main()
