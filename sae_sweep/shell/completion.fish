# sae-sweep completion fish > ~/.config/fish/completions/sae-sweep.fish
function __sae_sweep
    set -l words (commandline -opc) (commandline -ct)
    command $words[1] complete fish $words[2..-1] 2>/dev/null
end
complete -c sae-sweep -f -a '(__sae_sweep)'
