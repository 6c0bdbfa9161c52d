package qlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// device is what stands at an end: it answers one request at a time.
type device interface {
	answer(ctx context.Context, kind byte, body []byte) (reply, error)
	close()
}

// reply is an answer: what is open in it, and then what is secret and belongs to whoever gets it.
type reply struct {
	kind   byte
	open   [][]byte
	secret []byte
}

// serveEnd lets a KME in that knows the secret of the end, puts whoever was there
// out, and answers its requests until it leaves or is put out itself.
func (s *Server) serveEnd(ctx context.Context, conn net.Conn, hangUp context.CancelFunc, sock *socket, install func() device) {
	log := s.cfg.Log.With("end", sock.end.String())
	if err := authenticate(conn, sock); err != nil {
		if ctx.Err() == nil {
			log.Warn("connection refused", "err", err)
		}
		return
	}
	sock.mu.Lock()
	if sock.live != nil {
		sock.live()
	}
	sock.live = hangUp
	dev := install()
	sock.mu.Unlock()
	defer dev.close()

	log.Info("connected")
	if err := answerAll(ctx, conn, dev); err != nil {
		log = log.With("err", err)
	}
	log.Info("disconnected")
}

// authenticate reads a hello and compares its secret. It answers only what is wrong.
func authenticate(conn net.Conn, sock *socket) error {
	if err := conn.SetDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	kind, body, err := readFrame(conn, maxHello)
	if err != nil {
		return fmt.Errorf("reading hello: %w", err)
	}
	defer clear(body)
	h, err := parseHello(body)
	if kind != kindHello || err != nil {
		return refuseHello(conn, "not a hello of this version")
	}
	// The secret first: a stranger does not learn whether he chose the right end.
	if right := sameSecret(h.secret, sock.secret); !right || h.end != sock.end {
		return refuseHello(conn, "wrong secret or wrong end")
	}
	return conn.SetDeadline(time.Time{})
}

func refuseHello(conn net.Conn, reason string) error {
	return errors.Join(errors.New(reason), writeFrame(conn, kindRefused, []byte(reason)))
}

// answerAll answers requests until the connection ends, and says why it did.
func answerAll(ctx context.Context, conn net.Conn, dev device) error {
	if err := writeFrame(conn, kindDone, nil); err != nil { // the answer to hello
		return err
	}
	for {
		kind, body, err := readFrame(conn, maxFrame)
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		r, err := dev.answer(ctx, kind, body)
		clear(body)
		var refusal *Refusal
		switch {
		case errors.Is(err, ErrCut):
			r = reply{kind: kindCut}
		case errors.Is(err, ErrLost):
			r = reply{kind: kindLost}
		case errors.As(err, &refusal):
			r = reply{kind: kindRefused, secret: []byte(refusal.Reason)}
		case err != nil:
			return err
		}
		if err := writeFrame(conn, r.kind, r.secret, r.open...); err != nil {
			return err
		}
	}
}

// aliceDevice speaks for the transmitter.
type aliceDevice struct {
	f *fibre
	t *transmitter
}

func (s *Server) newAlice() device {
	d := &aliceDevice{f: &s.fibre, t: &transmitter{last: -1}}
	s.fibre.attachAlice(d.t)
	return d
}

func (d *aliceDevice) close() { d.f.detachAlice(d.t) }

func (d *aliceDevice) answer(ctx context.Context, kind byte, body []byte) (reply, error) {
	switch kind {
	case kindSeed:
		session, seed, err := parseSeed(body)
		if err != nil {
			return reply{}, err
		}
		return reply{kind: kindDone}, d.f.seedAlice(d.t, session, seed)
	case kindFire:
		name, gates, err := parseFire(body)
		if err != nil {
			return reply{}, err
		}
		return reply{kind: kindDone}, d.f.fire(ctx, d.t, name, gates)
	case kindSent:
		name, asked, err := parseSent(body)
		if err != nil {
			return reply{}, err
		}
		sent, err := d.f.sent(d.t, name, asked)
		return reply{kind: kindChoices, secret: sent}, err
	}
	return reply{}, fmt.Errorf("%w: kind %#x at alice's end", errMalformed, kind)
}

// bobDevice speaks for the receiver.
type bobDevice struct {
	f *fibre
	r *receiver
}

func (s *Server) newBob() device {
	d := &bobDevice{f: &s.fibre, r: &receiver{}}
	s.fibre.attachBob(d.r)
	return d
}

func (d *bobDevice) close() { d.f.detachBob(d.r) }

func (d *bobDevice) answer(_ context.Context, kind byte, body []byte) (reply, error) {
	switch kind {
	case kindSeed:
		session, seed, err := parseSeed(body)
		if err != nil {
			return reply{}, err
		}
		return reply{kind: kindDone}, d.f.seedBob(d.r, session, seed)
	case kindDetections:
		name, err := parseName(body)
		if err != nil {
			return reply{}, err
		}
		gates, seen, err := d.f.detections(d.r, name)
		return reply{kindDetectedAt, gates, seen}, err
	}
	return reply{}, fmt.Errorf("%w: kind %#x at bob's end", errMalformed, kind)
}
