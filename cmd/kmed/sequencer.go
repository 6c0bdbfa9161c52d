package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/kme"
	"github.com/qutemail/kme/policies"
)

// Run is kmed sequencer: a process that folds the site's events into the audit
// log's tree and signs its checkpoints, and does nothing else. It needs of the
// configuration the folder of policies, the token and audit.sequencer, and runs as a
// user who may read no key's blob. Its end with an audit.BadLeaf says that the log was
// tampered with, which it has told the nodes.
func (c sequencerCommand) Run(ctx context.Context, log *slog.Logger) error {
	env, err := ReadEnvironment(os.Getenv)
	if err != nil {
		return err
	}
	cfg, err := LoadConfig(c.Config, env)
	if err != nil {
		return err
	}
	if cfg.Audit.Sequencer == "" {
		return errors.New("audit.sequencer is missing: the DSN of the role kme_seq")
	}
	set, err := policies.Load(cfg.Policies)
	if err != nil {
		return err
	}
	token, err := hsm.Open(ctx, cfg.token(log))
	if err != nil {
		return fmt.Errorf("opening the HSM: %w", err)
	}
	defer func() { _ = token.Close() }() // nothing is under way
	key, err := token.OpenSigningKey(ctx, kme.LogKeyLabel(cfg.KME))
	if errors.Is(err, hsm.ErrNoSigningKey) {
		return fmt.Errorf("%w: the first kmed of the site makes it", err)
	}
	if err != nil {
		return err
	}
	q, err := auditlog.NewSequencer(auditlog.Config{
		DSN: cfg.Audit.Sequencer, TrustDomain: set.TrustDomain, Site: cfg.KME, Key: key, Now: failpoint.Now, Log: log,
	})
	if err != nil {
		return err
	}
	defer q.Close()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		err := fold(ctx, token, q)
		switch {
		case ctx.Err() != nil:
			return nil
		case isForged(err), errors.Is(err, hsm.ErrPINRefused):
			return err
		case err != nil:
			log.Warn("folding audit events", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// beatTime is how long the token may take to say that it is well, or to be found again.
const beatTime = 2 * time.Second

// fold folds what events there are. It asks the token first whether it is well: that is
// also the way back of one that was away.
func fold(ctx context.Context, token *hsm.Token, q *auditlog.Sequencer) error {
	beating, cancel := context.WithTimeout(ctx, beatTime)
	err := token.Heartbeat(beating)
	cancel()
	for more := true; more && err == nil; {
		var f auditlog.Folded
		f, err = q.Step(ctx)
		more = f.More
	}
	return err
}

// isForged says whether an error is that the audit log was tampered with.
func isForged(err error) bool {
	_, is := errors.AsType[*audit.BadLeaf](err)
	return is
}
