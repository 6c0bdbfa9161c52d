package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/qutemail/kme/internal/secretfile"
	"github.com/qutemail/kme/pki"
)

// Run says all that is wrong with the configuration and the files that it names, and opens
// nothing: it may be run beside the node that serves.
func (c configCheck) Run(stdout io.Writer) error {
	env, err := ReadEnvironment(os.Getenv)
	if err != nil {
		return err
	}
	cfg, err := LoadConfig(c.Config, env)
	if err != nil {
		return err
	}
	n := &node{cfg: cfg, env: env}
	errs := []error{n.openPolicies()}
	if errs[0] == nil {
		for _, lc := range cfg.Links {
			_, err := n.link(lc)
			errs = append(errs, err)
		}
	}
	for _, role := range slices.Sorted(maps.Keys(cfg.Certificates.Issuers)) {
		if _, err := pki.LoadPool(cfg.Certificates.Issuers[role]); err != nil {
			errs = append(errs, fmt.Errorf("the issuing CA of role %s: %w", role, err))
		}
	}
	if _, err := os.Stat(filepath.Join(cfg.Certificates.Dir, "cert.pem")); err == nil {
		_, err := pki.LoadCredential(cfg.Certificates.Dir)
		errs = append(errs, err)
	} else if cfg.Certificates.TokenFile == "" {
		errs = append(errs, fmt.Errorf("there is no certificate in %s, and certificates.token_file names no one-time token to get one with", cfg.Certificates.Dir))
	}
	_, err = os.Stat(cfg.HSM.Module)
	errs = append(errs, err)
	if cfg.HSM.PINFile != "" {
		errs = append(errs, secretfile.Check(cfg.HSM.PINFile))
	}
	for _, lc := range cfg.Links {
		switch {
		case len(lc.Upstream.URL) > 0:
			_, err := pki.LoadCredential(lc.Upstream.TLS)
			errs = append(errs, err)
		case lc.Filler == 0:
			errs = append(errs, secretfile.Check(lc.SecretFile))
		}
		if lc.AuthFile != "" {
			errs = append(errs, secretfile.Check(lc.AuthFile))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, note := range env.notes {
		if _, err := fmt.Fprintln(stdout, "of the environment:", note); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(stdout, "%s: ok: node %s of KME %s, %d links, SAEs at %s, operators at %s\n",
		c.Config, cfg.Node, cfg.KME, len(cfg.Links), env.address(n.entry.SAE), n.entry.Operator)
	return err
}
