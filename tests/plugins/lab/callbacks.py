"""A callback without an `__init__` of its own: notes the steps that it sees."""


class Notes:
    def on_start(self, start):
        self.file = start.run_dir / "notes.txt"
        self.file.write_text("")

    def on_event(self, event):
        with self.file.open("a") as file:
            file.write(f"{event.step}\n")

    def on_end(self):
        pass
