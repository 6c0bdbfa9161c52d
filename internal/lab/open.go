package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
)

// CheckDir checks the lab in cfg.Dir, whether it is up or not. Databases that do
// not run are started for it and stopped again.
func CheckDir(ctx context.Context, cfg Config) (report Report, err error) {
	l := &Lab{Config: cfg}
	if l.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return report, err
	}
	s, err := l.loadState()
	if err != nil {
		return report, fmt.Errorf("there is no lab in %s (kmelab up makes one): %w", cfg.Dir, err)
	}
	l.Ports = s.Ports
	l.KM1, l.KM2 = l.site("km1", "alice"), l.site("km2", "bob")
	for _, site := range []*Site{l.KM1, l.KM2} {
		if err := site.attach(ctx); err != nil {
			return report, err
		}
		defer func() { err = errors.Join(err, site.stopDatabase()) }()
	}
	return l.Check(ctx)
}
