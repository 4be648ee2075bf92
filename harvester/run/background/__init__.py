"""Do beside a pass what it needs while it lasts: status, canaries, terms, opening hours, mirror."""
