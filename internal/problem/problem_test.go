package problem

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"
)

// TestKinds: each has a name of its own, which stands in the audit log and so may
// never change.
func TestKinds(t *testing.T) {
	t.Parallel()
	want := map[Kind]string{
		Internal: "internal", Invalid: "invalid", Unauthorized: "unauthorized", Forbidden: "forbidden",
		NotFound: "not-found", Gone: "gone", TooLarge: "too-large", Unavailable: "unavailable",
	}
	if len(want) != len(names) {
		t.Errorf("%d kinds are tested, and %d have names", len(want), len(names))
	}
	for k, name := range want {
		if k.String() != name {
			t.Errorf("kind %d is called %q, want %q", k, k, name)
		}
	}
	if Kind(0) != Internal {
		t.Error("an Error with nothing in it is not our fault")
	}
}

// TestTwoVoices: the operator reads the kind, the sentence and the cause; the
// caller gets the sentence alone, so no cause may get into it.
func TestTwoVoices(t *testing.T) {
	t.Parallel()
	cause := fmt.Errorf("opening the pool: %w", fs.ErrPermission)
	for _, tt := range []struct {
		err      *Error
		operator string
		caller   string
	}{
		{New(Invalid, "size is %d, and shall be a multiple of %d", 100, 8), "invalid: size is 100, and shall be a multiple of 8", "size is 100, and shall be a multiple of 8"},
		{New(NotFound, ""), "not-found", ""},
		{Because(Unauthorized, cause), "unauthorized: opening the pool: permission denied", ""},
		{Because(Gone, nil), "gone", ""},
		{&Error{Kind: Unavailable, Detail: "come again", RetryAfter: time.Second, Err: cause}, "unavailable: come again: opening the pool: permission denied", "come again"},
		{&Error{}, "internal", ""},
	} {
		if got := tt.err.Error(); got != tt.operator {
			t.Errorf("the operator reads %q, want %q", got, tt.operator)
		}
		if tt.err.Detail != tt.caller || strings.Contains(tt.err.Detail, "permission") {
			t.Errorf("the caller reads %q, want %q", tt.err.Detail, tt.caller)
		}
		if has := tt.err.Err != nil; errors.Is(tt.err, fs.ErrPermission) != has {
			t.Errorf("%v: its cause is found: %t", tt.err, !has)
		}
	}
}

// TestKindOf is that of the outermost Error: a door may give a cause another kind.
func TestKindOf(t *testing.T) {
	t.Parallel()
	gone := Because(Gone, New(Invalid, "no such key"))
	for _, tt := range []struct {
		err  error
		want Kind
	}{
		{nil, Internal},
		{errors.New("a disk that is full"), Internal},
		{New(TooLarge, "too large"), TooLarge},
		{gone, Gone},
		{fmt.Errorf("taking keys: %w", gone), Gone},
		{errors.Join(errors.New("and more"), Because(Forbidden, nil)), Forbidden},
		{&Error{Kind: Unavailable, RetryAfter: time.Minute}, Unavailable},
	} {
		if got := KindOf(tt.err); got != tt.want {
			t.Errorf("KindOf(%v) = %s, want %s", tt.err, got, tt.want)
		}
	}
	if e, ok := errors.AsType[*Error](errors.Unwrap(gone)); !ok || e.Kind != Invalid {
		t.Errorf("the cause of %v is %v", gone, e)
	}
}

func TestBrief(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"short":                               "short",
		strings.Repeat("x", 1024):             strings.Repeat("x", 1024),
		strings.Repeat("x", 1023) + "\u00e4b": strings.Repeat("x", 1023) + " ...",
		strings.Repeat("x", 1<<20):            strings.Repeat("x", 1024) + " ...",
	} {
		if got := Brief(errors.New(text)); got != want {
			t.Errorf("%d bytes: %d bytes that end with %q", len(text), len(got), got[max(0, len(got)-8):])
		}
	}
}
