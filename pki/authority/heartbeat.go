package authority

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

const (
	heartbeatEvery = 10 * time.Second
	heartbeatFails = 3
)

// heartbeat signs something with the issuing key every ten seconds and returns an error
// when that has failed three times: a token that has come back is found by a new
// process only, so this one ends and its supervisor starts the next.
func heartbeat(ctx context.Context, key crypto.Signer, every time.Duration, log *slog.Logger) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	digest := sha256.Sum256([]byte("heartbeat")) // of no certificate
	for failed := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		_, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err == nil {
			failed = 0
			continue
		}
		failed++
		log.Error("the issuing key does not sign", "err", err, "times", failed)
		if failed == heartbeatFails {
			return fmt.Errorf("%w: %w", ErrNoKey, err)
		}
	}
}

// ErrNoKey is the end of a Serve whose token is gone.
var ErrNoKey = errors.New("the issuing key cannot be used any more: start the CA again when its token is back")
