"""Papers that go with rows and students: who taught, under which terms, what is owed. Pure."""
