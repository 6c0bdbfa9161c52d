package kme

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/qutemail/kme/hsm"
)

// Zeroizing is for an emergency: every key of the token is destroyed, and with it all
// that is stored, whether or not anything else works. What says so afterwards is in the
// token, where every node of the site looks each second, and in a file of the node, for
// when the token is gone. `kmed recover --burn` brings the site back: it accounts for
// what was lost, and then says, in the token and in another file, up to which mark. That is
// the one that it found when it began: whoever zeroizes meanwhile stops the site again.
// A mark is never taken away, so that none is that somebody makes at the same time.

// The token's counters that say when it was zeroized, in seconds since 1970, and up to
// which of these the site has been recovered. Counters never go back.
const (
	zeroizedCounter  = "kme-zeroized"
	recoveredCounter = "kme-zeroized-recovered"
)

// zeroizedFile is the mark in a node's data folder, and recoveredFile says likewise up to
// which mark the site was recovered.
func zeroizedFile(dataDir string) string  { return filepath.Join(dataDir, "zeroized") }
func recoveredFile(dataDir string) string { return filepath.Join(dataDir, "zeroized-recovered") }

// zeroizeTries bounds how often keys are looked for that a node has made meanwhile.
const zeroizeTries = 5

// Zeroize destroys every secret key of the token and the authentication secrets of the
// links, ours or not, and tells out which. It needs neither the database nor that the
// nodes are stopped: they serve nothing from the next second on, and their session copies
// go. The marks come first, so that no node that finds its keys missing makes others.
func Zeroize(ctx context.Context, token *hsm.Token, dataDir string, now time.Time, out io.Writer) error {
	mark, errFile, errMark := setMark(ctx, token, dataDir, now, out) // the keys go even if it fails
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
			if recovered, err := token.Counter(ctx, recoveredCounter); err == nil && recovered >= mark { // before the last key was gone
				_, errFile, errMark = setMark(ctx, token, dataDir, now, out)
			}
			fmt.Fprintln(out, "no secret key and no authentication secret is left in the token")
			return errors.Join(errFile, errMark)
		}
	}
	return errors.New("keys are being made in the token as fast as they are destroyed: stop the nodes, and do it again")
}

// setMark marks the site as zeroized, in the file and in the token.
func setMark(ctx context.Context, token *hsm.Token, dataDir string, now time.Time, out io.Writer) (mark int64, errFile, errMark error) {
	mark, errMark = nextMark(ctx, token, dataDir, now)
	text := fmt.Sprintf("%d\nzeroized at %s: kmed recover --burn brings the site back\n", mark, now.UTC().Format(time.RFC3339))
	if errFile = os.MkdirAll(dataDir, 0o700); errFile == nil {
		errFile = writeDurably(zeroizedFile(dataDir), []byte(text))
	}
	errMark = errors.Join(errMark, token.SetCounter(ctx, zeroizedCounter, mark))
	for _, err := range []error{errFile, errMark} {
		if err != nil {
			fmt.Fprintf(out, "MARKING FAILED: %v\n", err)
		}
	}
	return mark, errFile, errMark
}

// nextMark is now, or later than all earlier marks if that is more, whatever the clock
// says: one that is not would be taken for an older zeroizing, from which the site was
// recovered. With an error it is later than those that could be read.
func nextMark(ctx context.Context, token *hsm.Token, dataDir string, now time.Time) (mark int64, err error) {
	m, err := readMarks(ctx, token, dataDir)
	return max(now.Unix(), m.last()+1, m.recovered+1, m.recoveredFile+1), err
}

// marks are when the site was zeroized last, by the token and by this node's file, and up to
// which mark it was recovered, likewise: 0 where nothing says so.
type marks struct{ zeroized, recovered, file, recoveredFile int64 }

// readMarks reads them. With an error it is those that could be read.
func readMarks(ctx context.Context, token *hsm.Token, dataDir string) (m marks, err error) {
	var errs [4]error
	m.zeroized, errs[0] = token.Counter(ctx, zeroizedCounter)
	m.recovered, errs[1] = token.Counter(ctx, recoveredCounter)
	m.file, errs[2] = readMark(zeroizedFile(dataDir))
	m.recoveredFile, errs[3] = readMark(recoveredFile(dataDir))
	if err := errors.Join(errs[:]...); err != nil {
		return m, fmt.Errorf("looking whether the token was zeroized: %w", err)
	}
	return m, nil
}

// last is the last mark.
func (m marks) last() int64 { return max(m.zeroized, m.file) }

// stands is the mark from which the site has not been recovered: 0 if there is none. The
// file's counts also beside a token that knows nothing of it.
func (m marks) stands() int64 {
	switch {
	case m.zeroized > m.recovered:
		return m.zeroized
	case m.file > max(m.recovered, m.recoveredFile):
		return m.file
	}
	return 0
}

// zeroized says that the site was zeroized and not recovered since; "" if it was not.
func (k *KME) zeroized(ctx context.Context) (string, error) {
	m, err := readMarks(ctx, k.Token, k.DataDir)
	if err != nil {
		return "", err
	}
	return m.text(), nil
}

func (m marks) text() string {
	at := m.stands()
	if at == 0 {
		return ""
	}
	return fmt.Sprintf("the site was zeroized at %s: all keys of its HSM were destroyed", time.Unix(at, 0).UTC().Format(time.RFC3339))
}

// readMark reads the mark in a file: 0 if there is none.
func readMark(file string) (at int64, err error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err == nil {
		_, err = fmt.Sscan(string(text), &at)
	}
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", file, err)
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

// errZeroizedAgain says that the site was zeroized while it was being recovered.
var errZeroizedAgain = errors.New("the site was zeroized while it was being recovered: recover it again")

// endZeroized notes that the site has been recovered up to the mark that stood when the
// recovery began: 0 if there was none. A later mark is another zeroizing, from which it has
// not; one that comes while this goes on stops the site as soon as a node looks.
func (k *KME) endZeroized(ctx context.Context, mark int64) error {
	m, err := readMarks(ctx, k.Token, k.DataDir)
	switch {
	case err != nil:
		return err
	case m.last() > mark:
		return errZeroizedAgain
	case m.stands() == 0:
		return nil
	}
	if err := k.Token.SetCounter(ctx, recoveredCounter, max(mark, m.recovered)); err != nil {
		return err
	}
	return writeDurably(recoveredFile(k.DataDir), []byte(strconv.FormatInt(mark, 10)+"\n"))
}
