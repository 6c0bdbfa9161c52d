package pki

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Times of the CRLs.
const (
	crlEvery      = 30 * time.Second // between two fetches
	crlEveryTold  = time.Second      // the same, while a change is expected
	crlTold       = 30 * time.Second // how long that is, from Expect
	crlTimeout    = 3 * time.Second  // of one fetch
	crlSkew       = 5 * time.Minute  // how far in the future a CRL may begin: clocks disagree
	maxCRLBytes   = 16 << 20         // 400,000 revoked certificates
	maxSerialBits = 160              // RFC 5280, 4.1.2.2
)

// DefaultCRLAlarm is the age of a CRL that Trouble tells of if nothing else is said: a CA
// of ours signs one every ten minutes.
const DefaultCRLAlarm = 15 * time.Minute

// RevocationsConfig says whose CRLs Revocations reads, and from where. Everything
// must be set unless said otherwise.
type RevocationsConfig struct {
	Role    identity.Role // of the certificates, for names of files and metrics
	Issuers *Issuers
	URLs    []string         // http:// or https:// of a CRL each; which CA signed it, it says itself
	Dir     string           // where the last good CRL of each CA is kept; made if missing
	Alarm   time.Duration    // age of a CRL that Trouble tells of; default DefaultCRLAlarm
	Log     *slog.Logger     // default slog.Default()
	Now     func() time.Time // default time.Now
}

// Revocations is what the CAs of one role have revoked, as far as their CRLs say.
//
// A CRL counts if one of the CAs signed it, if it is about all of that CA's
// certificates, and if its number is not below that of the one before: whoever sits
// between here and the CA can keep a CRL back, but not set it back, and not for
// longer than until its nextUpdate. From that moment, and before a first CRL, all of
// the CA's certificates are refused.
type Revocations struct {
	cfg     RevocationsConfig
	client  *http.Client
	current atomic.Pointer[revoked]
	told    chan struct{}

	mu     sync.Mutex // held by whoever makes the next revoked; guards what follows
	kept   map[string]*revocationList
	errors map[string]error // of the last fetch, by URL
	disk   error            // of the last write

	failures atomic.Int64 // fetches that brought nothing that counts
}

// revoked is the state of all CAs at one moment. It does not change.
type revoked struct {
	lists    map[string]*revocationList // by the CA's subject key identifier
	replaced chan struct{}              // closed when it is no longer the current one
}

// revocationList is a CRL that counts.
type revocationList struct {
	raw                    []byte
	ca                     string // its CA's name, for people
	number                 *big.Int
	thisUpdate, nextUpdate time.Time
	serials                map[serial]int // to the reason code (RFC 5280, 5.3.1)
	onDisk                 bool
}

// serial is a serial number, big-endian.
type serial [maxSerialBits / 8]byte

// OpenRevocations reads the CRLs that were kept and fetches each once, for 3 seconds
// at most. Failing in that is no error: Trouble tells of it, and Run goes on trying.
func OpenRevocations(ctx context.Context, c RevocationsConfig) (*Revocations, error) {
	c.Alarm = cmp.Or(c.Alarm, DefaultCRLAlarm)
	c.Log = cmp.Or(c.Log, slog.Default()).With("role", c.Role)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Issuers == nil || len(c.URLs) == 0 || c.Dir == "" {
		return nil, errors.New("opening the CRLs: Issuers, URLs and Dir must be set")
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the CRLs: %w", err)
	}
	r := &Revocations{
		cfg: c, told: make(chan struct{}, 1), kept: make(map[string]*revocationList), errors: make(map[string]error),
		client: &http.Client{
			Transport:     &http.Transport{DisableCompression: true, MaxResponseHeaderBytes: 16 << 10}, // and no proxy
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	r.current.Store(&revoked{replaced: make(chan struct{})})
	r.mu.Lock()
	r.readKept()
	r.publish()
	r.mu.Unlock()
	r.fetch(ctx)
	return r, nil
}

// Check is nil if the CA of leaf has said lately that leaf is not revoked. Else it is
// an *identity.Denial: revoked, or without a CRL that still holds. It takes no lock.
func (r *Revocations) Check(leaf *x509.Certificate, now time.Time) error {
	l := r.current.Load().lists[string(leaf.AuthorityKeyId)]
	switch {
	case l == nil:
		return &identity.Denial{Reason: identity.NoCRL, Detail: fmt.Sprintf("there is no CRL of the CA %x", leaf.AuthorityKeyId)}
	case now.After(l.nextUpdate):
		return &identity.Denial{Reason: identity.NoCRL, Detail: "the CRL of " + l.ca + " ended at " + l.nextUpdate.UTC().Format(time.RFC3339)}
	case leaf.SerialNumber.Sign() < 0 || leaf.SerialNumber.BitLen() > maxSerialBits:
		return &identity.Denial{Reason: identity.Revoked, Detail: "no CRL can name its serial number"}
	}
	var s serial
	leaf.SerialNumber.FillBytes(s[:])
	if reason, is := l.serials[s]; is {
		return &identity.Denial{Reason: identity.Revoked, Detail: fmt.Sprintf("reason %d, CRL %s of %s", reason, l.number, l.ca)}
	}
	return nil
}

// Changed is closed when Check may answer otherwise than it does now. Ask for it
// before Check, and again after it was closed.
func (r *Revocations) Changed() <-chan struct{} { return r.current.Load().replaced }

// Expect has the CRLs fetched now, and every second for half a minute: something was
// revoked.
func (r *Revocations) Expect() {
	select {
	case r.told <- struct{}{}:
	default:
	}
}

// Run fetches the CRLs until ctx ends.
func (r *Revocations) Run(ctx context.Context) error {
	defer r.client.CloseIdleConnections()
	var toldUntil time.Time
	for {
		pause := crlEvery
		if time.Now().Before(toldUntil) {
			pause = crlEveryTold
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-r.told:
			timer.Stop()
			toldUntil = time.Now().Add(crlTold)
		case <-timer.C:
		}
		r.fetch(ctx)
	}
}

// From has the CRLs fetched from these URLs from now on.
func (r *Revocations) From(urls []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cfg.URLs = urls
	maps.DeleteFunc(r.errors, func(url string, _ error) bool { return !slices.Contains(urls, url) })
}

// Reissued takes up the CAs that Issuers has now: CRLs of those that are gone count
// no more.
func (r *Revocations) Reissued() {
	r.mu.Lock()
	r.readKept()
	r.publish()
	r.mu.Unlock()
	r.Expect()
}

// fetch asks every URL once, all at the same time.
func (r *Revocations) fetch(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, crlTimeout)
	defer cancel()
	var all sync.WaitGroup
	r.mu.Lock()
	urls := r.cfg.URLs
	r.mu.Unlock()
	for _, url := range urls {
		all.Go(func() {
			raw, err := r.get(ctx, url)
			r.mu.Lock()
			defer r.mu.Unlock()
			if err == nil {
				err = r.accept(raw)
			}
			if slices.Contains(r.cfg.URLs, url) {
				r.outcome(url, err)
			}
		})
	}
	all.Wait()
}

// outcome notes how a fetch went, and logs what is new about it.
func (r *Revocations) outcome(url string, err error) {
	if err != nil {
		r.failures.Add(1)
		if before := r.errors[url]; before == nil || before.Error() != err.Error() {
			r.cfg.Log.Warn("fetching a CRL", "url", url, "err", err)
		}
	}
	r.errors[url] = err
}

func (r *Revocations) get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", url, res.Status)
	}
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxCRLBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", url, err)
	}
	if len(raw) > maxCRLBytes {
		return nil, fmt.Errorf("the CRL at %s has more than %d bytes", url, maxCRLBytes)
	}
	return raw, nil
}

// accept makes a CRL the one that counts, and keeps it on the disk. One that cannot
// be written counts all the same: it can only have more to say than the one before.
func (r *Revocations) accept(raw []byte) error {
	for _, l := range r.kept {
		if l.onDisk && bytes.Equal(l.raw, raw) {
			return nil
		}
	}
	ca, l, err := r.read(raw)
	if err != nil {
		return err
	}
	if now := r.cfg.Now(); now.After(l.nextUpdate) {
		return fmt.Errorf("the CRL of %s ended at %s", l.ca, l.nextUpdate.UTC().Format(time.RFC3339))
	} else if l.thisUpdate.After(now.Add(crlSkew)) {
		return fmt.Errorf("the CRL of %s begins at %s: does a clock go wrong?", l.ca, l.thisUpdate.UTC().Format(time.RFC3339))
	}
	key := string(ca.SubjectKeyId)
	if before := r.kept[key]; before != nil {
		switch order := l.number.Cmp(before.number); {
		case order < 0:
			return fmt.Errorf("the CRL of %s goes back from number %s to %s: was its CA restored from an old copy?", l.ca, before.number, l.number)
		case order == 0 && !bytes.Equal(l.raw, before.raw):
			return fmt.Errorf("%s signed two CRLs with the number %s", l.ca, l.number)
		}
	}
	if before := r.kept[key]; before == nil || !bytes.Equal(before.raw, l.raw) {
		r.kept[key] = l
		r.publish()
		r.cfg.Log.Info("a new CRL", "ca", l.ca, "number", l.number.String(), "revoked", len(l.serials), "until", l.nextUpdate)
	}
	if r.disk = replaceFile(r.file(ca), raw, 0o600); r.disk == nil {
		r.kept[key].onDisk = true
	}
	return nil
}

// publish makes what is kept the current state, as far as it is of a CA of today.
func (r *Revocations) publish() {
	next := &revoked{lists: make(map[string]*revocationList), replaced: make(chan struct{})}
	for _, ca := range r.cfg.Issuers.all() {
		if l := r.kept[string(ca.SubjectKeyId)]; l != nil {
			next.lists[string(ca.SubjectKeyId)] = l
		}
	}
	close(r.current.Swap(next).replaced)
}

// readKept reads the CRLs on the disk of CAs that have none yet. One that has ended
// by now is read too: its number still holds.
func (r *Revocations) readKept() {
	for _, ca := range r.cfg.Issuers.all() {
		if r.kept[string(ca.SubjectKeyId)] != nil {
			continue
		}
		raw, err := os.ReadFile(r.file(ca))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var l *revocationList
		if err == nil {
			_, l, err = r.read(raw)
		}
		if err != nil {
			r.cfg.Log.Error("the CRL that was kept cannot be read", "file", r.file(ca), "err", err)
			continue
		}
		l.onDisk = true
		r.kept[string(ca.SubjectKeyId)] = l
	}
}

func (r *Revocations) file(ca *x509.Certificate) string {
	return filepath.Join(r.cfg.Dir, string(r.cfg.Role)+"-"+hex.EncodeToString(ca.SubjectKeyId)+".crl")
}

// read parses a CRL and verifies that one of the CAs signed it, whatever the time.
func (r *Revocations) read(raw []byte) (*x509.Certificate, *revocationList, error) {
	crl, err := x509.ParseRevocationList(raw)
	if err != nil {
		return nil, nil, fmt.Errorf("that is no CRL: %w", err)
	}
	var ca *x509.Certificate
	for _, c := range r.cfg.Issuers.all() {
		if len(c.SubjectKeyId) > 0 && bytes.Equal(c.SubjectKeyId, crl.AuthorityKeyId) {
			ca = c
		}
	}
	if ca == nil {
		return nil, nil, fmt.Errorf("the CRL of %s (key %x) is of no CA of ours", crl.Issuer, crl.AuthorityKeyId)
	}
	l, err := readList(crl, ca)
	if err != nil {
		return nil, nil, fmt.Errorf("the CRL of %s: %w", crl.Issuer, err)
	}
	return ca, l, nil
}

func readList(crl *x509.RevocationList, ca *x509.Certificate) (*revocationList, error) {
	if err := crl.CheckSignatureFrom(ca); err != nil {
		return nil, err
	}
	switch {
	case !bytes.Equal(crl.RawIssuer, ca.RawSubject):
		return nil, errors.New("it is signed by a CA of another name")
	case crl.Number == nil:
		return nil, errors.New("it has no number")
	case crl.NextUpdate.IsZero():
		return nil, errors.New("it has no end")
	}
	if err := checkScope(crl.Extensions); err != nil {
		return nil, err
	}
	l := &revocationList{
		raw: crl.Raw, ca: ca.Subject.CommonName, number: crl.Number, thisUpdate: crl.ThisUpdate, nextUpdate: crl.NextUpdate,
		serials: make(map[serial]int, len(crl.RevokedCertificateEntries)),
	}
	for _, e := range crl.RevokedCertificateEntries {
		if e.SerialNumber.Sign() < 0 || e.SerialNumber.BitLen() > maxSerialBits {
			return nil, fmt.Errorf("serial number %s is out of bounds", e.SerialNumber)
		}
		for _, x := range e.Extensions {
			if x.Critical { // e.g. the entry is about another CA's certificate
				return nil, fmt.Errorf("an entry has the unknown critical extension %s", x.Id)
			}
		}
		var s serial
		e.SerialNumber.FillBytes(s[:])
		l.serials[s] = e.ReasonCode
	}
	return l, nil
}

var oidIssuingDistributionPoint = asn1.ObjectIdentifier{2, 5, 29, 28}

// checkScope refuses CRLs that tell of a part only: of CA certificates, of some
// reasons, of what has changed (a delta), of another CA's certificates.
func checkScope(extensions []pkix.Extension) error {
	for _, x := range extensions {
		if x.Id.Equal(oidIssuingDistributionPoint) {
			var point struct { // RFC 5280, 5.2.5
				Name           asn1.RawValue  `asn1:"optional,tag:0"`
				OnlyUsers      bool           `asn1:"optional,tag:1"`
				OnlyCAs        bool           `asn1:"optional,tag:2"`
				OnlyReasons    asn1.BitString `asn1:"optional,tag:3"`
				Indirect       bool           `asn1:"optional,tag:4"`
				OnlyAttributes bool           `asn1:"optional,tag:5"`
			}
			rest, err := asn1.Unmarshal(x.Value, &point)
			if err != nil || len(rest) > 0 {
				return errors.New("its issuing distribution point cannot be read")
			}
			if point.OnlyCAs || point.Indirect || point.OnlyAttributes || point.OnlyReasons.BitLength > 0 {
				return errors.New("it does not tell of all certificates")
			}
		} else if x.Critical {
			return fmt.Errorf("it has the unknown critical extension %s", x.Id)
		}
	}
	return nil
}

// Trouble is what an operator should know of now; "" if all is well. A CRL's age is
// counted from its thisUpdate, so that one that somebody keeps back grows old here
// as well. CAs that sign less often than every ten minutes want a longer Alarm.
func (r *Revocations) Trouble(now time.Time) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []string
	state := r.current.Load()
	for _, ca := range r.cfg.Issuers.all() {
		switch l := state.lists[string(ca.SubjectKeyId)]; {
		case l == nil:
			all = append(all, "there is no CRL of "+ca.Subject.CommonName+": nobody whom it certified is let in")
		case now.After(l.nextUpdate):
			all = append(all, "the CRL of "+l.ca+" has ended: nobody whom it certified is let in")
		case now.Sub(l.thisUpdate) > r.cfg.Alarm:
			all = append(all, fmt.Sprintf("the CRL of %s is %v old; from %s nobody whom it certified is let in",
				l.ca, now.Sub(l.thisUpdate).Round(time.Second), l.nextUpdate.UTC().Format(time.RFC3339)))
		case !l.onDisk && r.disk != nil:
			all = append(all, "the CRL of "+l.ca+" is not kept on the disk: "+r.disk.Error())
		}
	}
	if len(all) > 0 {
		for _, url := range slices.Sorted(maps.Keys(r.errors)) {
			if err := r.errors[url]; err != nil {
				all = append(all, err.Error())
			}
		}
	}
	return strings.Join(all, "; ")
}
