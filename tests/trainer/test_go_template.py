"""Check the Go template interpreter against examples of Go's documentation and its tests."""

from __future__ import annotations

import pytest

from tests.trainer.go_template import TemplateError, render_data

DATA = {"Name": "Ann", "None": "", "Items": ["a", "b", "c"], "Deep": {"Field": 7}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{23 -}} < {{- 45}}", "23<45"),  # the example of trim markers in the documentation
        ("a {{/* a comment */ -}} b", "a b"),
        ("{{.Name}} {{ .Deep.Field }} {{ $.Name }}", "Ann 7 Ann"),
        ("{{ if .None }}x{{ else if eq .Name `x` }}{{ end }}".replace("`x`", '"x"'), ""),
        ('{{ if eq .Name "Bob" "Ann" }}any{{ end }}', "any"),  # eq compares the first with each other
        ("{{ if .None }}x{{ else }}y{{ end }}", "y"),
        ("{{ range .Items }}[{{ . }}]{{ end }}", "[a][b][c]"),
        ("{{ range $x := .Items }}{{ $x }}{{ $.Name }} {{ end }}", "aAnn bAnn cAnn "),
        ("{{ range $i, $x := .Items }}{{ $i }}{{ $x }}{{ end }}", "0a1b2c"),
        ("{{ range .None }}x{{ else }}empty{{ end }}", "empty"),
        ("{{ $n := 1 }}{{ range .Items }}{{ $n = . }}{{ end }}{{ $n }}", "c"),  # = sets the outer variable
        ("{{ $n := 1 }}{{ if true }}{{ $n := 2 }}{{ end }}{{ $n }}", "1"),  # := is local to its block
        ("{{ len (slice .Items 1) }} {{ index .Items 2 }}", "2 c"),
        ("{{ and .Name .None }}|{{ or .None .Name }}|{{ not .None }}", "|Ann|true"),
        ('{{ "a\\n\\"b" }}', 'a\n"b'),
    ],
)
def test_a_template_renders_as_go_renders_it(template, text):
    assert render_data(template, DATA) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ .Nothing }}",
        "{{ $undefined }}",
        "{{ printf .Name }}",
        "{{ .Name | len }}",
        "{{ with .Name }}x{{ end }}",
        "{{ if .Name }}",
        "{{ end }}",
        "{{ }}",
        "{{ .Name",
        "{{ eq .Name 1 }}",
        "{{ len (slice .Items 9) }}",
        "{{ (len .Items }}",
        "{{ .Name .Name }}",
    ],
)
def test_what_is_not_known_is_refused(template):
    with pytest.raises(TemplateError):
        render_data(template, DATA)
