package etsi014

import (
	"fmt"
	"strings"
	"testing"

	"github.com/qutemail/kme/internal/key"
)

func BenchmarkParseKeyRequest(b *testing.B) {
	body := []byte(`{"number": 3, "size": 256}`)
	master, slave := parsed(b, "alice"), parsed(b, "bob")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseKeyRequest(body, master, slave, wide); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseKeyIDs(b *testing.B) {
	ids := make([]key.ID, 128)
	for i := range ids {
		ids[i][15] = byte(i)
	}
	body := keyIDsBody(ids)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseKeyIDs(body, wide); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendContainer(b *testing.B) {
	for _, number := range []int{1, 128} {
		b.Run(fmt.Sprintf("keys=%d", number), func(b *testing.B) {
			var c Container
			for range number {
				c.Keys = append(c.Keys, Key{Material: key.NewMaterial([]byte(strings.Repeat("k", 32))), Provenance: key.Simulated})
			}
			b.ReportAllocs()
			for b.Loop() {
				clear(appendContainer(make([]byte, 0, containerSize(c)), c))
			}
		})
	}
}
