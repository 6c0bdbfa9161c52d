//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

const (
	defaultConcurrent = 4
	startAttempts     = 5                      // SoftHSM: two processes starting on one directory can trip each other
	startPause        = 100 * time.Millisecond // before the next attempt
	alonePatience     = 2 * time.Second        // how long a change of the token waits for the calls in the module
	closePatience     = 10 * time.Second       // how long a Close waits for calls that are in the module
)

// Token is a token this process has logged in to. It is the module's only owner
// in the process. Its methods may be called from many goroutines.
type Token struct {
	cfg Config
	log *slog.Logger
	m   *module

	// gate has one turn for each call that may be in the module. Only who is alone
	// changes what follows up to keks, and makes or destroys objects; whoever has a
	// turn may read it.
	gate    *gate
	slot    uint
	info    Info
	anchor  pkcs11.SessionHandle // keeps the login alive and owns every session copy of a KEK
	refused error                // the PIN was refused: never log in again
	closed  bool
	keks    map[*KEK]struct{} // open KEKs, to be opened again after healing

	down  atomic.Pointer[outage] // nil while calls are let in
	grace atomic.Pointer[outage] // not nil while the token is away and its session copies are used on
	stuck atomic.Int64           // calls in the module that nobody waits for any more
	count counters

	visits  chan *visit    // to the workers, of whom there are as many as turns
	workers sync.WaitGroup // Close waits for them

	mu   sync.Mutex             // guards idle
	idle []pkcs11.SessionHandle // RO sessions of the hot path, never more than turns
}

// outage is why the token is not in use, and since when.
type outage struct {
	cause error
	since time.Time
}

// Open loads and initialises the module, finds the one token with the label, logs
// in once and shows by a self-test that the token seals and refuses as it should.
// It fails if somebody in this process has the module already.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	t, err := prepare(cfg)
	if err != nil {
		return nil, err
	}
	if err = t.start(ctx); err == nil {
		if err = t.selfTest(); err != nil {
			_ = t.m.Finalize()
		}
	}
	if err != nil {
		t.m.unload()
		return nil, fmt.Errorf("opening hsm token %q: %w", cfg.TokenLabel, err)
	}
	for range t.gate.width {
		t.workers.Go(t.serve)
	}
	return t, nil
}

// prepare checks the configuration and loads the module, which is not initialised.
func prepare(cfg Config) (*Token, error) {
	if cfg.MaxConcurrent == 0 {
		cfg.MaxConcurrent = defaultConcurrent
	}
	if cfg.TokenLabel == "" || cfg.MaxConcurrent < 0 {
		return nil, fmt.Errorf("opening hsm: token label %q and %d calls at a time are not a configuration", cfg.TokenLabel, cfg.MaxConcurrent)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m, err := load(cfg.Module, cfg.ModuleArgs)
	if err != nil {
		return nil, fmt.Errorf("opening hsm: %w", err)
	}
	m.weak = cfg.WeakAttributes
	return &Token{
		cfg: cfg, log: cfg.Log.With("token", cfg.TokenLabel), m: m,
		gate: newGate(cfg.MaxConcurrent), visits: make(chan *visit, cfg.MaxConcurrent),
		keks: make(map[*KEK]struct{}),
	}, nil
}

// start brings the module up and logs in. What may pass by itself is tried again until
// StartPatience is over, as an HSM that is not on the network yet; and some times without
// any, when another process may just be starting on the same SoftHSM. A PIN is not.
func (t *Token) start(ctx context.Context) error {
	var over <-chan time.Time
	if t.cfg.StartPatience > 0 {
		over = time.After(t.cfg.StartPatience)
	}
	pause := startPause
	for attempt := 1; ; attempt++ {
		err := t.initialise()
		if err == nil {
			if err = t.login(); err == nil {
				return nil
			}
			_ = t.m.Finalize()
		}
		mayPass := isFault(err) && over != nil || attempt < startAttempts &&
			(errors.Is(err, errNoToken) || isRV(err, pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_TOKEN_NOT_RECOGNIZED))
		if errors.Is(err, ErrPINRefused) || isRV(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) || !mayPass {
			return err
		}
		t.log.Warn("the HSM does not start: trying again", "err", err)
		select {
		case <-time.After(pause):
			pause = min(2*pause, time.Second)
		case <-over:
			return err
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

// initialise initialises the module and finds the token. On failure the module is
// not initialised, unless it was somebody else who did so.
func (t *Token) initialise() error {
	if err := t.m.initialise(); err != nil {
		if isRV(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
			return fmt.Errorf("%s has another owner in this process: %w", t.cfg.Module, err)
		}
		return fmt.Errorf("module %s (for SoftHSM see SOFTHSM2_CONF and its directory): %w", t.cfg.Module, err)
	}
	err := t.findToken()
	if err != nil {
		_ = t.m.Finalize()
	}
	return err
}

// errNoToken: no slot has the token. SoftHSM says so too for the moment in which another
// process logs in: that writes the file of the token's label and serial number anew, and
// who reads it meanwhile finds it empty.
var errNoToken = errors.New("want exactly one")

// findToken finds the one slot whose token has our label, and our serial number if the
// configuration names one. Once a token was opened, another one in its place is
// refused: its keys are others.
func (t *Token) findToken() error {
	slots, err := t.m.GetSlotList(true)
	if err != nil {
		return fault("C_GetSlotList", err)
	}
	var found []pkcs11.TokenInfo
	var others []string // serial numbers of tokens with our label
	for _, slot := range slots {
		ti, err := t.m.GetTokenInfo(slot)
		if err != nil {
			return fmt.Errorf("slot %d: %w", slot, fault("C_GetTokenInfo", err))
		}
		if ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 || strings.TrimSpace(ti.Label) != t.cfg.TokenLabel {
			continue
		}
		if serial := infoOf(ti).Serial; t.cfg.Serial != "" && serial != t.cfg.Serial {
			if serial != "" { // see errNoToken
				others = append(others, serial)
			}
			continue
		}
		found = append(found, ti)
		t.slot = slot
	}
	switch {
	case len(found) == 0 && len(others) > 0:
		return fmt.Errorf("the token with the label %q has the serial number %s, not %q: it is another token", t.cfg.TokenLabel, strings.Join(others, " or "), t.cfg.Serial)
	case len(found) == 0:
		return fmt.Errorf("0 tokens have the label %q in %d slots, %w", t.cfg.TokenLabel, len(slots), errNoToken)
	case len(found) > 1:
		return fmt.Errorf("%d tokens have the label %q in %d slots, want exactly one", len(found), t.cfg.TokenLabel, len(slots))
	}
	info := infoOf(found[0])
	if t.info.Serial != "" && info != t.info {
		return fmt.Errorf("token is now %+v but was %+v: restart to accept another token", info, t.info)
	}
	t.info = info
	return nil
}

func infoOf(ti pkcs11.TokenInfo) Info {
	i := Info{
		Manufacturer: strings.TrimSpace(ti.ManufacturerID),
		Model:        strings.TrimSpace(ti.Model),
		Serial:       strings.TrimSpace(ti.SerialNumber),
	}
	i.Software = strings.HasPrefix(i.Manufacturer, "SoftHSM")
	return i
}

// login opens the anchor session and logs in with the PIN from its file, which is
// read anew each time so that the PIN need not stay in memory. It tries no PIN that
// was refused before.
func (t *Token) login() error {
	if t.refused != nil {
		return fmt.Errorf("not logging in again: %w", t.refused)
	}
	s, err := t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return fault("C_OpenSession", err)
	}
	if err = t.loginOn(s); err != nil {
		_ = t.m.CloseSession(s)
		if errors.Is(err, ErrPINRefused) {
			t.refused = err
		}
		return err
	}
	t.anchor = s
	return nil
}

func (t *Token) loginOn(s pkcs11.SessionHandle) error {
	pin, err := readPIN(t.cfg.pin())
	if err != nil {
		return err
	}
	defer clear(pin)
	notes, err := t.refusals(s)
	if err != nil {
		return err
	}
	if !t.cfg.RetryPIN {
		if err := t.mayTry(pin, notes); err != nil {
			return err
		}
	}
	err = t.m.login(s, pkcs11.CKU_USER, pin)
	switch {
	case err == nil, isRV(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		if len(notes) > 0 {
			if err := t.forget(); err != nil {
				t.log.Warn("notes of refused PINs are left", "err", err)
			}
		}
		return nil
	case isRV(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED):
		return errors.Join(fmt.Errorf("%w: that of %s: %w", ErrPINRefused, t.cfg.pin(), err), t.note(pin))
	}
	return err
}

// mayTry is nil if a login with pin may be tried.
func (t *Token) mayTry(pin []byte, notes []refusal) error {
	ti, err := t.m.GetTokenInfo(t.slot)
	if err != nil {
		return fault("C_GetTokenInfo", err)
	}
	switch {
	case ti.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return fmt.Errorf("%w: the token says that its PIN is locked", ErrPINRefused)
	case ti.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return fmt.Errorf("%w: the token says that one more wrong PIN locks it, so it is not tried", ErrPINRefused)
	}
	for _, n := range notes {
		if n.illegible != nil {
			return fmt.Errorf("%w: %w: it may be of this PIN, which is not tried (kmed hsm selftest --retry-pin tries it, once)", ErrPINRefused, n.illegible)
		}
		if n.of(pin) {
			return fmt.Errorf("%w: this PIN was tried at %s and is not tried again", ErrPINRefused, n.at.Format(time.RFC3339))
		}
	}
	return nil
}

// Info is what the token said of itself when it was opened.
func (t *Token) Info() Info { return t.info }

// Close logs out and gives the module up. Calls that are under way finish first;
// if one is stuck in the module for 10 s, Close fails and the module stays as it
// is. Every KEK of the token is unusable afterwards. Closing twice is harmless.
func (t *Token) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	return t.close(ctx)
}

// close is Close, which waits until ctx ends.
func (t *Token) close(ctx context.Context) error {
	if err := t.gate.enter(ctx, alone); err != nil {
		return fmt.Errorf("closing hsm token %q: a call is stuck in the module: %w", t.cfg.TokenLabel, err)
	}
	defer t.gate.leave(alone)
	if t.closed {
		return nil
	}
	t.closed = true
	close(t.visits)
	t.workers.Wait() // not for long: none is in the module
	t.down.Store(&outage{cause: errors.New("token was closed"), since: time.Now()})
	t.idle = nil
	// Closing the sessions destroys the copies of the KEKs and logs out, whatever
	// state the module is in.
	_ = t.m.CloseAllSessions(t.slot)
	err := fault("C_Finalize", t.m.Finalize())
	t.m.unload()
	if err != nil && !isRV(err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) { // an outage can leave it so
		return fmt.Errorf("closing hsm token %q: %w", t.cfg.TokenLabel, err)
	}
	return nil
}

// Random fills b from the token's generator.
func (t *Token) Random(ctx context.Context, b []byte) error {
	got := make([]byte, len(b)) // not b: the module may write to it when nobody waits any more
	err := t.call(ctx, urgent, "random", func() error {
		return t.onSession(func(s pkcs11.SessionHandle) error { return t.m.random(s, got) })
	}, func() { clear(got) })
	if err != nil {
		return err
	}
	copy(b, got)
	clear(got)
	return nil
}

// isRV says whether err is one of the module's return values rvs.
func isRV(err error, rvs ...pkcs11.Error) bool {
	e, ok := errors.AsType[pkcs11.Error](err)
	if !ok {
		return false
	}
	for _, rv := range rvs {
		if e == rv {
			return true
		}
	}
	return false
}
