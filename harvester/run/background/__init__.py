"""Do what a pass needs while it lasts: seal, write its status, check addresses, terms and hours, mirror."""
