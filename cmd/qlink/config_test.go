package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/deploy"
	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/yamlfile/yamltest"
)

// TestExample: the shipped example is whole, loads, and what it says of defaults is so.
func TestExample(t *testing.T) {
	t.Parallel()
	got := yamltest.Example(t, deploy.QlinkYAML, func(text string) (Config, error) { return parseConfig("/etc/kmed/qlink.yaml", []byte(text)) })
	want := Config{
		Alice:   EndConfig{"/run/qlink/alice.sock", "/etc/kmed/qlink/alice.secret"},
		Bob:     EndConfig{"/run/qlink/bob.sock", "/etc/kmed/qlink/bob.secret"},
		Control: "/run/qlink/control.sock", Light: got.Light,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the example (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(bb84.Standard(), got.Light.params()); diff != "" {
		t.Errorf("the light that nobody has changed (-the lab's +got):\n%s", diff)
	}
	if defaults := yamltest.Default.FindAllString(deploy.QlinkYAML, -1); len(defaults) != 12 {
		t.Errorf("the example shows %d defaults: %q", len(defaults), defaults)
	}
}
