package kme

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/qutemail/kme/hsm"
)

// Zeroizing is for an emergency: every key of the token is destroyed, and with it all
// that is stored, whether or not anything else works. What says so afterwards is in the
// token, where every node of the site looks each second, and in a file of the node, for
// when the token is gone. `kmed recover --burn` brings the site back: it accounts for
// what was lost, and the mark in the token is older than what it leaves.

// The token's counters that say when it was zeroized, in seconds since 1970, and up to
// which of these the site has been recovered. Counters never go back.
const (
	zeroizedCounter  = "kme-zeroized"
	recoveredCounter = "kme-zeroized-recovered"
)

// zeroizedFile is the mark in a node's data folder.
func zeroizedFile(dataDir string) string { return filepath.Join(dataDir, "zeroized") }

// zeroizeTries bounds how often keys are looked for that a node has made meanwhile.
const zeroizeTries = 5

// Zeroize destroys every secret key of the token and the authentication secrets of the
// links, ours or not, and tells out which. It needs neither the database nor that the
// nodes are stopped: they serve nothing from the next second on, and their session copies
// go. The marks come first, so that no node that finds its keys missing makes others.
func Zeroize(ctx context.Context, token *hsm.Token, dataDir string, now time.Time, out io.Writer) error {
	mark, errMark := nextMark(ctx, token, dataDir, now)
	text := fmt.Sprintf("%d\nzeroized at %s: kmed recover --burn brings the site back\n", mark, now.UTC().Format(time.RFC3339))
	errFile := os.MkdirAll(dataDir, 0o700)
	if errFile == nil {
		errFile = writeDurably(zeroizedFile(dataDir), []byte(text))
	}
	errMark = errors.Join(errMark, token.SetCounter(ctx, zeroizedCounter, mark))
	for _, err := range []error{errFile, errMark} {
		if err != nil { // the keys go all the same
			fmt.Fprintf(out, "MARKING FAILED: %v\n", err)
		}
	}
	for range zeroizeTries {
		destroyed, err := token.DestroyAll(ctx)
		for _, info := range destroyed {
			fmt.Fprintf(out, "destroyed %s\n", info)
		}
		if err != nil {
			return errors.Join(errFile, errMark, err)
		}
		if len(destroyed) == 0 {
			if at, err := token.Counter(ctx, zeroizedCounter); errMark == nil && (err != nil || at < mark) {
				return errors.Join(errFile, fmt.Errorf("the token shows nothing, not even the mark that was just made (%d, %v): keys may be left in it", at, err))
			}
			fmt.Fprintln(out, "no secret key and no authentication secret is left in the token")
			return errors.Join(errFile, errMark)
		}
	}
	return errors.New("keys are being made in the token as fast as they are destroyed: stop the nodes, and do it again")
}

// nextMark is now, or later than all earlier marks if that is more, whatever the clock
// says: one that is not would be taken for an older zeroizing, from which the site was
// recovered. With an error it is later than those that could be read.
func nextMark(ctx context.Context, token *hsm.Token, dataDir string, now time.Time) (mark int64, err error) {
	zeroized, e1 := token.Counter(ctx, zeroizedCounter)
	recovered, e2 := token.Counter(ctx, recoveredCounter)
	inFile, e3 := readZeroized(dataDir)
	return max(now.Unix(), zeroized+1, recovered+1, inFile+1), errors.Join(e1, e2, e3)
}

// zeroized says that the site was zeroized and not recovered since; "" if it was not.
func (k *KME) zeroized(ctx context.Context) (string, error) {
	at, err := k.Token.Counter(ctx, zeroizedCounter)
	if err != nil {
		return "", fmt.Errorf("looking whether the token was zeroized: %w", err)
	}
	recovered, err := k.Token.Counter(ctx, recoveredCounter)
	if err != nil {
		return "", fmt.Errorf("looking whether the token was zeroized: %w", err)
	}
	if at <= recovered {
		if at, err = readZeroized(k.DataDir); err != nil || at <= recovered {
			return "", err
		}
	}
	return fmt.Sprintf("the site was zeroized at %s: all keys of its HSM were destroyed", time.Unix(at, 0).UTC().Format(time.RFC3339)), nil
}

// readZeroized reads the mark in the data folder: 0 if there is none.
func readZeroized(dataDir string) (at int64, err error) {
	text, err := os.ReadFile(zeroizedFile(dataDir))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err == nil {
		_, err = fmt.Sscan(string(text), &at)
	}
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", zeroizedFile(dataDir), err)
	}
	return at, nil
}

// watchZeroized stops this node when somebody has zeroized the token, also without the
// database, and gives up its copies of what was destroyed.
func (k *KME) watchZeroized(ctx context.Context) {
	if k.suspended() != "" {
		return
	}
	asking, cancel := context.WithTimeout(ctx, time.Second) // a library may never return: the heartbeat says so
	why, err := k.zeroized(asking)
	cancel()
	if err != nil || why == "" {
		return // a token that does not answer has its own alarm
	}
	k.past.suspended.CompareAndSwap(nil, why)
	k.keks.close()
	if err := k.suspend(ctx, why); err != nil { // for the database, when it is back: the next process suspends it
		k.Log.Warn("suspending the site", "err", err)
	}
	k.alarmSuspended(ctx, why)
}

// endZeroized notes that the site has been recovered since it was zeroized.
func (k *KME) endZeroized(ctx context.Context) error {
	at, err := k.Token.Counter(ctx, zeroizedCounter)
	if err != nil {
		return err
	}
	inFile, err := readZeroized(k.DataDir)
	if err != nil {
		return err
	}
	if at = max(at, inFile); at == 0 {
		return nil
	}
	if err := k.Token.SetCounter(ctx, recoveredCounter, at); err != nil {
		return err
	}
	if err := os.Remove(zeroizedFile(k.DataDir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the mark of the zeroized token: %w", err)
	}
	return nil
}
