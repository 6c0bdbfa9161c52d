//go:build !cgo

package hsm

import (
	"context"
	"crypto/ed25519"
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// errNoCgo is all that a build without cgo can say: PKCS#11 is a C interface. The
// types are here so that whatever imports the package can still be checked.
var errNoCgo = errors.New("hsm: this binary was built without cgo and cannot load a PKCS#11 module")

// Token is a token this process has logged in to. Without cgo there is none.
type Token struct{}

// KEK is an open key-encryption key. Without cgo there is none.
type KEK struct{}

// SigningKey is an Ed25519 key in the token. Without cgo there is none.
type SigningKey struct{}

// ErrNoSigningKey is what the cgo twin returns for a label without a key.
var ErrNoSigningKey = errors.New("no such signing key")

// Open fails: the binary was built without cgo.
func Open(context.Context, Config) (*Token, error) { return nil, errNoCgo }

// InitToken fails: the binary was built without cgo.
func InitToken(modulePath, label, soPIN, pin string) error { return errNoCgo }

// Examine fails: the binary was built without cgo.
func Examine(context.Context, Config) (Info, []Check, error) { return Info{}, nil, errNoCgo }

// NewPIN fails: the binary was built without cgo.
func NewPIN(path string) (string, error) { return "", errNoCgo }

// AuthSecretCheck says nothing: the binary was built without cgo.
func AuthSecretCheck([]byte) string { return "" }

// The methods do what their cgo twins say. None can be reached, since Open fails.

func (*Token) Close() error                                        { return errNoCgo }
func (*Token) Info() Info                                          { return Info{} }
func (*Token) Random(context.Context, []byte) error                { return errNoCgo }
func (*Token) Heartbeat(context.Context) error                     { return errNoCgo }
func (*Token) NewKEK(context.Context, string) (KEKInfo, error)     { return KEKInfo{}, errNoCgo }
func (*Token) OpenKEK(context.Context, KEKInfo) (*KEK, error)      { return nil, errNoCgo }
func (*Token) DestroyKEK(context.Context, KEKInfo) error           { return errNoCgo }
func (*Token) ListKEKs(context.Context) ([]KeyStatus, error)       { return nil, errNoCgo }
func (*Token) DestroyAll(context.Context) ([]string, error)        { return nil, errNoCgo }
func (*Token) CloseKEK(context.Context, KEKInfo) error             { return errNoCgo }
func (*Token) CloseKEKs(context.Context) error                     { return errNoCgo }
func (*Token) Counter(context.Context, string) (int64, error)      { return 0, errNoCgo }
func (*Token) SetCounter(context.Context, string, int64) error     { return errNoCgo }
func (*Token) Keys(context.Context) ([]KeyStatus, error)           { return nil, errNoCgo }
func (*Token) Verify(context.Context, []KEKInfo) error             { return errNoCgo }
func (*Token) NewAuthSecret(context.Context) ([]byte, error)       { return nil, errNoCgo }
func (*Token) AuthSecret(context.Context, string) ([]byte, error)  { return nil, errNoCgo }
func (*Token) SetAuthSecret(context.Context, string, []byte) error { return errNoCgo }
func (*Token) DestroyAuthSecret(context.Context, string) error     { return errNoCgo }
func (*Token) Health() Health                                      { return Health{} }
func (*Token) Describe(chan<- *prometheus.Desc)                    {}
func (*Token) Collect(chan<- prometheus.Metric)                    {}
func (*KEK) Info() KEKInfo                                         { return KEKInfo{} }
func (*KEK) Wraps() int64                                          { return 0 }
func (*KEK) Close() error                                          { return errNoCgo }
func (*KEK) UnwrapAll(context.Context, []Sealed) ([][]byte, error) { return nil, errNoCgo }
func (*KEK) WrapAll(context.Context, [][]byte, [][]byte) ([]Sealed, error) {
	return nil, errNoCgo
}

func (*KEK) WrapAllInBackground(context.Context, [][]byte, [][]byte) ([]Sealed, error) {
	return nil, errNoCgo
}

func (*KEK) Unwrap(context.Context, [IVBytes]byte, []byte, []byte) ([]byte, error) {
	return nil, errNoCgo
}

func (*KEK) Wrap(context.Context, []byte, []byte) (iv [IVBytes]byte, ct []byte, err error) {
	return iv, nil, errNoCgo
}

func (*Token) OpenSigningKey(context.Context, string) (*SigningKey, error) { return nil, errNoCgo }
func (*Token) NewSigningKey(context.Context, string) (*SigningKey, error)  { return nil, errNoCgo }
func (*SigningKey) Public() ed25519.PublicKey                              { return nil }
func (*SigningKey) Sign(context.Context, []byte) ([]byte, error)           { return nil, errNoCgo }
