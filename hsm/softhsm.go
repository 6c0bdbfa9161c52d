package hsm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// WriteSoftHSMConfig makes dir (mode 0700) the home of SoftHSM tokens: dir/tokens
// and dir/softhsm2.conf, whose absolute path it returns. The caller puts that path
// into SOFTHSM2_CONF, with os.Setenv too: SoftHSM reads it when the module is
// initialised. Processes that start at once should not share a directory.
func WriteSoftHSMConfig(dir string) (confPath string, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("writing SoftHSM configuration: %w", err)
	}
	if strings.ContainsAny(dir, "#=\r\n") { // SoftHSM reads them as its configuration's grammar
		return "", fmt.Errorf("writing SoftHSM configuration: directory %q: SoftHSM cannot take a path with #, = or a line break in it", dir)
	}
	tokens := filepath.Join(dir, "tokens")
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return "", fmt.Errorf("writing SoftHSM configuration: %w", err)
	}
	confPath = filepath.Join(dir, "softhsm2.conf")
	conf := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", tokens)
	if err := os.WriteFile(confPath, []byte(conf), 0o600); err != nil {
		return "", fmt.Errorf("writing SoftHSM configuration: %w", err)
	}
	return confPath, nil
}
